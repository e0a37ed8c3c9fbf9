"""Which modules can have an update, and the class that wraps each."""

from __future__ import annotations

from typing import Any

from flax import nnx

from lora_flax.layers.dense import LoRADense
from lora_flax.layers.tied_head import LoRATiedHead
from lora_flax.layers.trained_whole import SavedModule
from lora_flax.layers.wrappers import LoRAConv, LoRAEmbed, LoRALayer

Kind = tuple[type[LoRALayer], tuple[int, ...]]


def kind_of(module: object, stack: tuple[int, ...]) -> Kind | None:
    """A layer's wrapper class and the shape of one member's weight; None if it is not a layer.

    Transposed convolutions, and dense layers over other axes than the last, are not.

    Args:
        module: a plain module.
        stack: sizes of the stacks that contain it.
    """
    tied = getattr(module, "tied_shape", None)
    if isinstance(tied, tuple) and not stack:
        return LoRATiedHead, tied
    kernel, embedding = weight_shape(module, "kernel"), weight_shape(module, "embedding")
    window = getattr(module, "kernel_size", None)
    wrapper: type[LoRALayer]
    if isinstance(module, nnx.ConvTranspose):
        return None
    if isinstance(module, nnx.LinearGeneral) and module.axis != (-1,):
        return None
    if kernel is not None and isinstance(window, tuple):
        wrapper, shape, rank = LoRAConv, kernel, len(window) + 2
    elif kernel is not None:
        wrapper, shape, rank = LoRADense, kernel, 2
    elif embedding is not None:
        wrapper, shape, rank = LoRAEmbed, embedding, 2
    else:
        return None
    if len(shape) != len(stack) + rank or shape[: len(stack)] != stack:
        return None
    return wrapper, shape[len(stack) :]


def weight_shape(module: object, name: str) -> tuple[int, ...] | None:
    """The shape of a callable module's weight of that name, if it has one."""
    shape = getattr(getattr(module, name, None), "shape", None)
    return tuple(shape) if isinstance(shape, tuple) and callable(module) else None


def plain(module: Any) -> Any:
    """The module itself, below all wrappers at its place."""
    return module.plain if isinstance(module, LoRALayer | SavedModule) else module
