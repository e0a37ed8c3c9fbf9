"""Which parameters train: a filter for `nnx.split`, and the mask of an optimizer.

The recommended way holds the trainable arrays apart, so that nothing else has a gradient:

    graphdef, trainable, frozen = nnx.split(model, lora_flax.trainable_filter(model), ...)
    state = tx.init(trainable)

Who holds one tree of all parameters masks the optimizer instead:

    params = nnx.state(model, nnx.Param)
    tx = lora_flax.mask_optimizer(tx, lora_flax.trainable_mask(params))

Both give the same update; the second also computes the gradients of the frozen weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx

from lora_flax.config import Bias
from lora_flax.errors import LoraError
from lora_flax.targets import Path, wrappers

_UPDATE = ("lora_A", "lora_B")


@dataclass(frozen=True)
class TrainableFilter:
    """An NNX filter: `filter(path, variable)`, paths counted from the model it was made for."""

    wrapped: frozenset[Path]
    bias: Bias

    def __call__(self, path: Path, value: object) -> bool:
        return _trains(tuple(path), self.wrapped, self.bias)


def trainable_filter(model: nnx.Module) -> TrainableFilter:
    """The filter for what trains in a wrapped model: A, B, and the biases that its config names.

    Raises:
        LoraError: if the model has no LoRA layers, or is merged.
    """
    layers = wrappers(model)
    if not layers:
        raise LoraError(f"{type(model).__name__} has no LoRA layers; call wrap first")
    if any(layer.merged for _, layer in layers):
        raise LoraError("the model is merged, so its update has no gradient; call unmerge first")
    return TrainableFilter(frozenset(path for path, _ in layers), layers[0][1].config.bias)


def trainable_mask(tree: Any, bias: Bias = "none") -> Any:
    """A tree of bools like `tree`: True where a leaf trains.

    Goes by names, so any tree with the model's names will do: an `nnx.State`, the pure dict of
    one, or a model.

    Args:
        tree: parameters of a wrapped model.
        bias: as in `LoraConfig`.

    Raises:
        LoraError: if nothing in the tree trains.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [_names(key_path) for key_path, _ in flat]
    wrapped = {path[:-1] for path in paths if path and path[-1] in _UPDATE}
    if not wrapped:
        raise LoraError("the tree has no lora_A or lora_B; call wrap on the model first")
    return jax.tree.unflatten(treedef, [_trains(path, wrapped, bias) for path in paths])


def mask_optimizer(tx: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """`tx` for the leaves where `mask` is True; every other leaf has no state and never moves.

    `optax.masked` alone would hand raw gradients through for the other leaves and move the base.
    Clipping inside `tx` sees the norm of the trainable gradients only.

    Args:
        tx: any optax transformation.
        mask: bools, of the structure of the parameters (`trainable_mask`).
    """
    return optax.selective_transform(tx, freeze_mask=jax.tree.map(lambda train: not train, mask))


def _trains(path: Path, wrapped: Collection[Path], bias: Bias) -> bool:
    if path[-1] in _UPDATE:
        return path[:-1] in wrapped
    if path[-1] != "bias" or bias == "none":
        return False
    return bias == "all" or (path[-2:-1] == ("base",) and path[:-2] in wrapped)


def _names(key_path: tuple[Any, ...]) -> Path:
    """The keys of a JAX key path, without the step into an NNX variable."""
    names = [
        getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in key_path
    ]
    if names and names[-1] == "value" and isinstance(key_path[-1], jax.tree_util.GetAttrKey):
        names.pop()
    return tuple(names)
