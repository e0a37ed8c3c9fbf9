"""Which parameters train: a filter for `nnx.split`, an optimizer mask, and state dicts.

The recommended way is to split off the trainable arrays, so nothing else gets a gradient:

    trains = lora_flax.mark_only_lora_as_trainable(model)
    graphdef, trainable, frozen = nnx.split(model, trains, ...)
    state = tx.init(trainable)

If you keep all parameters in one tree, mask the optimizer instead:

    params = nnx.state(model, nnx.Param)
    tx = lora_flax.mask_optimizer(tx, lora_flax.trainable_mask(params))

Both give the same update; the second also computes the gradients of the frozen weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, get_args

import jax
import optax
from flax import nnx

from lora_flax.config import Bias
from lora_flax.errors import LoraError
from lora_flax.index import ModelIndex
from lora_flax.layers.trained_whole import ReplacedBase
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.targets.naming import Path

# `Trainer.get_decay_parameter_names` in transformers.
_NO_DECAY = ("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
# Leaves that are vectors in each layer of a stack.
_VECTORS = ("lora_bias", "lora_magnitude", "bias", "scale")


@dataclass(frozen=True)
class TrainableFilter:
    """An NNX filter: `filter(path, variable)`, with paths relative to the model it was created for.

    Attributes:
        adapters: paths below which every parameter trains.
        wrapped: paths of wrapped layers.
        bias: as in `LoraConfig`.
    """

    adapters: frozenset[Path]
    wrapped: frozenset[Path]
    bias: Bias

    def __call__(self, path: Path, value: object) -> bool:
        path = tuple(path)
        if any(path[:end] in self.adapters for end in range(len(path))):
            return isinstance(value, nnx.Param)
        return _bias_trains(path, self.wrapped, self.bias)


def mark_only_lora_as_trainable(model: nnx.Module, bias: Bias | None = None) -> TrainableFilter:
    """The filter for what trains in a wrapped model, loralib's `mark_only_lora_as_trainable`.

    Trainable parameters are those of the active adapters (A, B, magnitudes, copies of
    `modules_to_save`, token rows) and the biases that `bias` selects. Nothing is marked in the
    model itself: NNX splits by filters.

    Args:
        model: a wrapped model.
        bias: none, all, or only those of wrapped layers (lora_only); None uses the config's.

    Raises:
        LoraError: if the model has no LoRA layers, none is active, or it is merged.
    """
    return trainable_filter(ModelIndex(model), bias)


def trainable_filter(index: ModelIndex, bias: Bias | None = None) -> TrainableFilter:
    """`mark_only_lora_as_trainable` for an indexed model."""
    wrappers, owners = index.wrappers, index.owners
    if not owners:
        raise LoraError(f"{type(index.model).__name__} has no LoRA layers; call wrap first")
    if any(layer.merged for layer in wrappers.values()):
        raise LoraError("the model is merged, so its update has no gradient; call unmerge first")
    if bias is not None and bias not in get_args(Bias):
        raise LoraError(f"bias must be none, all or lora_only, not {bias!r}")
    adapters = {
        (*path, "adapters", name)
        for path, owner in owners.items()
        for name in owner.active
        if name in owner.adapters and not isinstance(owner, ReplacedBase)
    }
    if not adapters:
        raise LoraError("no adapter is active, so nothing would train; call set_adapter")
    if bias is None:
        bias = _configured_bias(wrappers.values())
    return TrainableFilter(frozenset(adapters), frozenset(wrappers), bias)


def trainable_mask(tree: Any, bias: Bias = "none") -> Any:
    """A tree of bools like `tree`: True where a leaf trains.

    Works by name, so it accepts any tree with the model's names: an `nnx.State`, its pure dict, or
    a model. Every adapter in the tree trains. Variables that are not parameters do not; a pure dict
    does not say which these are, so it should hold parameters alone.

    Args:
        tree: parameters of a wrapped model.
        bias: as in `LoraConfig`.

    Raises:
        LoraError: if nothing in the tree trains.
    """
    # Variables whole, for their types.
    flat, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    paths = [names_of(key_path) for key_path, _ in flat]
    adapters = {p[: i + 2] for p in paths for i, part in enumerate(p[:-2]) if part == "adapters"}
    if not adapters:
        raise LoraError("the tree has no adapters; call wrap on the model first")
    # A wrapper contains the layer itself and the adapters.
    wrapped = {path[:-2] for path in adapters}
    constants = ("scale", "start_A", "start_B")
    updates = {path[:-1] for path in paths if path[-1] == "lora_A"}

    def trains(path: Path, leaf: Any) -> bool:
        if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.Param):
            return False
        if any(path[:end] in adapters for end in range(len(path))):
            return not (path[-1] in constants and path[:-1] in updates)
        return _bias_trains(path, wrapped, bias)

    def filled(leaf: Any, train: bool) -> Any:
        return jax.tree.map(lambda _: train, leaf)

    masks = [filled(leaf, trains(p, leaf)) for p, (_, leaf) in zip(paths, flat, strict=True)]
    return jax.tree.unflatten(treedef, masks)


def decay_mask(tree: Any) -> Any:
    """A tree of bools like `tree`: True where HF's `Trainer` applies weight decay.

    It decays every parameter except those whose name in PEFT's model contains `bias`, `layernorm`,
    or `rmsnorm`, or has a component that is `norm` or ends in `_norm` (and torch's LayerNorm, whose
    weight is a `scale` in Flax). A, B, DoRA's magnitudes, and trained token rows decay; `lora_bias`
    and norms in `modules_to_save` do not.

    Args:
        tree: trainable parameters by the model's names; as a function of the tree, this can be the
            `mask` of `optax.adamw`.
    """

    def decays(key_path: tuple[Any, ...], leaf: object) -> bool:
        del leaf
        path = [str(name).lower() for name in names_of(key_path)]
        # The adapter's own name says nothing about its arrays.
        path = [name for i, name in enumerate(path) if not i or path[i - 1] != "adapters"]
        name = ".".join(path)
        return path[-1:] != ["scale"] and not any(re.search(p, name) for p in _NO_DECAY)

    return jax.tree_util.tree_map_with_path(decays, tree)


def mask_optimizer(tx: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """Applies `tx` where `mask` is True; all other leaves have no optimizer state and never change.

    `optax.masked` alone would pass raw gradients through for the other leaves and change the base.
    Clipping inside `tx` sees only the norm of the trainable gradients.

    Args:
        tx: any optax transformation.
        mask: bools, with the same structure as the parameters (`trainable_mask`).
    """
    return optax.selective_transform(tx, freeze_mask=jax.tree.map(lambda train: not train, mask))


def lora_state_dict(model: nnx.Module, bias: Bias | None = None) -> dict[str, jax.Array]:
    """loralib's `lora_state_dict`: what trains, by dotted name (`mlp.up.adapters.default.lora_A`).

    Raises:
        LoraError: for the same reasons as `mark_only_lora_as_trainable`.
    """
    trains = mark_only_lora_as_trainable(model, bias)
    flat = nnx.to_flat_state(nnx.state(model, trains))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def load_lora_state_dict(
    model: nnx.Module, state: dict[str, Any], bias: Bias | None = None
) -> None:
    """Loads a `lora_state_dict` into a model that is wrapped the same way.

    loralib loads with `strict=False`, which silently ignores misspelled names; here all names and
    shapes must match the model, and nothing is changed if one does not.

    Raises:
        LoraError: naming all missing, unexpected and misshapen arrays.
    """
    here = lora_state_dict(model, bias)
    problems = [f"missing: {name}" for name in sorted(here.keys() - state.keys())]
    problems += [f"unexpected: {name}" for name in sorted(state.keys() - here.keys())]
    problems += [
        f"{name} is {list(state[name].shape)}, not {list(here[name].shape)}"
        for name in sorted(here.keys() & state.keys())
        if tuple(state[name].shape) != here[name].shape
    ]
    if problems:
        raise LoraError(f"the state does not fit the model; {'; '.join(problems)}")
    trains = mark_only_lora_as_trainable(model, bias)
    for path, variable in nnx.to_flat_state(nnx.state(model, trains)):
        value = jax.numpy.asarray(state[".".join(map(str, path))], variable.get_value().dtype)
        variable.set_value(value)
        nnx.update(model, nnx.from_flat_state([(path, variable)]))


def loraplus(
    tx: optax.GradientTransformation, loraplus_lr_ratio: float
) -> optax.GradientTransformation:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns `loraplus_lr_ratio` times as fast as A.

    The updates of every lora_B are multiplied and, as in PEFT's `create_loraplus_optimizer`, those
    of every vector: DoRA's magnitudes, biases, and the scales of norms. For an optimizer whose step
    is proportional to its learning rate (AdamW including its weight decay, SGD), this is equivalent
    to a separate learning rate.

    Two things differ from PEFT. It trains the A and B of embeddings at a rate of their own
    (`loraplus_lr_embedding`, 1e-6); here, they are like any other. It stores the magnitudes of a
    convolution with more than one axis and so trains them as slowly as A.

    Args:
        tx: any optax transformation, over a tree with the model's names.
        loraplus_lr_ratio: the authors use 16 or more.
    """

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, u: u * loraplus_lr_ratio if _learns_fast(path, u) else u, updates
        )

    return optax.chain(tx, optax.stateless(scale))


def _learns_fast(key_path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf is a B or a vector; in a stack, only its name tells a vector from a matrix."""
    return names_of(key_path)[-1] in ("lora_B", *_VECTORS) or leaf.ndim < 2


def param_label(key_path: tuple[Any, ...]) -> str:
    """The group of a leaf: `lora_A`, `lora_B` (includes lora_bias) or `other`.

    For per-group optimizers: `optax.multi_transform(transforms, labels)` with `labels =
    jax.tree_util.tree_map_with_path(lambda path, _: param_label(path), params)`.
    """
    name = names_of(key_path)[-1]
    if name == "lora_A":
        return "lora_A"
    return "lora_B" if name in ("lora_B", "lora_bias") else "other"


def is_factor(key_path: tuple[Any, ...]) -> bool:
    """Whether a leaf is an A or a B: a `param_label` without lora_bias."""
    return names_of(key_path)[-1] in ("lora_A", "lora_B")


def _configured_bias(layers: Iterable[LoRALayer]) -> Bias:
    for layer in layers:
        for adapter in layer.in_use:
            return adapter.spec.config.bias
    return "none"


def _bias_trains(path: Path, wrapped: Collection[Path], bias: Bias) -> bool:
    if path[-1] != "bias" or bias == "none":
        return False
    return bias == "all" or (path[-2:-1] == ("base",) and path[:-2] in wrapped)


def names_of(key_path: tuple[Any, ...]) -> Path:
    """The keys of a JAX key path, without the final key into an NNX variable."""
    names = [
        getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in key_path
    ]
    if names and names[-1] == "value" and isinstance(key_path[-1], jax.tree_util.GetAttrKey):
        names.pop()
    return tuple(names)
