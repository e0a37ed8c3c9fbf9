"""Several named adapters on one model, as in PEFT's `PeftModel`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.index import ModelIndex
from lora_flax.layers.adapter import Adapter
from lora_flax.layers.wrappers import LoRAConv, LoRALayer, Rows
from lora_flax.summary import Report, report_on
from lora_flax.surgery.saved_modules import fit_tied_heads
from lora_flax.surgery.wrap import activate, insert

# PEFT's name for a row without an adapter.
BASE = "__base__"


def adapter_names(model: nnx.Module) -> list[str]:
    """The names of the model's adapters."""
    return names_of(ModelIndex(model))


def names_of(index: ModelIndex) -> list[str]:
    """`adapter_names` for an indexed model."""
    return list(dict.fromkeys(name for owner in index.owners.values() for name in _names(owner)))


def active_adapters(model: nnx.Module) -> tuple[str, ...]:
    """The names of the active adapters."""
    return active_of(ModelIndex(model))


def active_of(index: ModelIndex) -> tuple[str, ...]:
    """`active_adapters` for an indexed model."""
    return next((owner.active for owner in index.owners.values()), ())


def add_adapter(
    model: nnx.Module, adapter_name: str, config: LoraConfig, rngs: nnx.Rngs | None = None
) -> Report:
    """Adds an adapter to a wrapped or plain model and activates it.

    Raises:
        LoraError: if the name is taken, the model is merged, the config trains biases and another
            adapter does too, or for the same reasons as `wrap`.
    """
    index = ModelIndex(model)
    refuse_merged(index)
    refuse_taken(index, adapter_name)
    insert(index, config, rngs, adapter_name)
    return report_on(index)


def set_adapter(model: nnx.Module, adapter_name: str | Sequence[str]) -> None:
    """Activates one adapter, or several whose updates add up: these compute and train.

    Raises:
        LoraError: if the model is merged or has no adapter of that name.
    """
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    index = ModelIndex(model)
    refuse_merged(index)
    refuse_unknown(index, names)
    activate(index, names)


@contextmanager
def disable_adapter(model: nnx.Module) -> Iterator[None]:
    """Inside the context, the model computes the same as the base.

    Biases trained with `bias="all"` or `"lora_only"` keep their trained values, as in PEFT.

    Raises:
        LoraError: if the model is merged.
    """
    index = ModelIndex(model)
    refuse_merged(index)
    before = active_of(index)
    activate(index, ())
    try:
        yield
    finally:
        # Adapters may have been added or removed inside the context.
        activate(ModelIndex(model), before)


def delete_adapter(model: nnx.Module, adapter_name: str) -> None:
    """Removes an adapter; layers with no adapters left become plain again.

    If it was the only active adapter, the first remaining one becomes active.

    Raises:
        LoraError: if the model is merged or has no adapter of that name.
    """
    index = ModelIndex(model)
    refuse_merged(index)
    refuse_unknown(index, (adapter_name,))
    active = tuple(name for name in active_of(index) if name != adapter_name)
    for path, owner in index.owners.items():
        if adapter_name in owner.adapters:
            del owner.adapters[adapter_name]
            index.replace(path, owner if _names(owner) else owner.base)
    activate(index, active or tuple(names_of(index)[:1]))


@contextmanager
def mixed_batch(model: nnx.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the context, row i of a batch uses adapter `names[i]`, in a single forward pass.

    Equivalent to PEFT's `adapter_names` argument; `"__base__"` means no adapter. All rows use
    the base's own modules and tokens, whatever the active adapters train in full. The rows are an
    array in the model's state (`Rows`), so a jitted function accepts a different mix without
    recompiling as long as the set of names is the same.

    Args:
        model: a wrapped model.
        names: one name per row.

    Raises:
        LoraError: if the model has no adapter of that name, or if the adapters use `use_dora`,
            `lora_bias`, modules of their own, or convolutions, none of which can be mixed.
    """
    index = ModelIndex(model)
    refuse_merged(index)
    known = sorted({name for name in names if name != BASE})
    refuse_unknown(index, known)
    layers = tuple(index.wrappers.values())
    for layer in layers:
        for name in known:
            _refuse_mixing(layer, name)
    saved, active = tuple(index.saved_modules.values()), active_of(index)
    if any(name in _names(module) for module in saved for name in known):
        raise LoraError("adapters with modules_to_save or trainable tokens cannot be mixed")
    # The base is treated as an adapter that no layer has.
    order = [*known, BASE]
    rows = np.array([order.index(name) for name in names], np.int32)
    for layer in layers:
        stack = next(iter(_adapters(layer))).scale[...].shape[:-1]
        layer.rows = Rows(jnp.broadcast_to(rows, (*stack, len(names))))
        layer.row_names = tuple(order)
    for module in saved:
        module.active = ()
    fit_tied_heads(index)
    try:
        yield
    finally:
        for module in saved:
            module.active = active
        fit_tied_heads(ModelIndex(model))
        for layer in layers:
            layer.rows, layer.row_names = nnx.data(None), ()


def refuse_merged(index: ModelIndex) -> None:
    """Raises LoraError if the model is merged."""
    if any(layer.merged for layer in index.wrappers.values()):
        raise LoraError("the model is merged; unmerge it first")


def refuse_taken(index: ModelIndex, name: str) -> None:
    """Raises LoraError if the model has an adapter of that name."""
    if name in names_of(index):
        raise LoraError(f"adapter {name!r} already exists")


def refuse_unknown(index: ModelIndex, names: Sequence[str]) -> None:
    """Raises LoraError if the model lacks an adapter of one of the names."""
    there = names_of(index)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise LoraError(f"no adapter {', '.join(map(repr, unknown))}; the model has {there}")


def _refuse_mixing(layer: LoRALayer, name: str) -> None:
    if name not in layer.adapters:
        return
    if isinstance(layer, LoRAConv):
        raise LoraError("adapters of convolutions cannot be mixed in one batch")
    adapter = layer.adapters[name]
    if adapter.lora_magnitude is not None or adapter.lora_bias is not None:
        raise LoraError(f"{name!r} has use_dora or lora_bias and cannot be mixed in one batch")


def _names(owner: Any) -> list[str]:
    return list(owner.adapters.keys())


def _adapters(layer: LoRALayer) -> list[Adapter]:
    return [layer.adapters[name] for name in _names(layer)]
