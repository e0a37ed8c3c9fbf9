"""Many adapters trained at once over one frozen base.

Every adapter array gets a leading axis of size N and the base gets none; `jax.vmap` turns a
function of one adapter into a function of N, and XLA reads each base weight once for all of them:

    many = lora_flax.wrap_many(model, configs, rngs)
    losses = jax.vmap(loss, in_axes=(0, 0, None))(many.trainable, many.constants, many.frozen)
    lora_flax.put_one(model, many, index)  # adapter `index` alone, ready for save_peft

where `loss` merges `nnx.merge(many.graphdef, trainable, constants, frozen)`. Ranks below the
largest are zero-padded, and the padding stays zero (see `lora_flax/layers/adapter.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_flax.config import DEFAULT, LoraConfig
from lora_flax.errors import LoraError
from lora_flax.index import ModelIndex
from lora_flax.layers.adapter import Adapter, LoRAScale, LoRAStart
from lora_flax.layers.wrappers import LoRAConv
from lora_flax.surgery.wrap import insert, remove
from lora_flax.targets.naming import dotted
from lora_flax.trainable import trainable_filter

State = nnx.State[Any, Any]
# Fields that may differ between adapters.
_OWN = ("r", "lora_alpha")


@dataclasses.dataclass(frozen=True)
class Many:
    """N adapters and their base, in the form `nnx.merge` takes.

    Attributes:
        configs: one config per adapter.
        graphdef: graphdef of the model with one adapter.
        trainable: leaves `[N, ...]`.
        constants: scales and starts, leaves `[N, ...]`; not trained.
        frozen: everything else, without the N axis.
    """

    configs: tuple[LoraConfig, ...]
    graphdef: nnx.GraphDef[Any]
    trainable: State
    constants: State
    frozen: State


def wrap_many(model: nnx.Module, configs: Sequence[LoraConfig], rngs: Sequence[nnx.Rngs]) -> Many:
    """Wraps a plain model in place for N adapters, each initialized as by `wrap` on its own.

    Args:
        model: a plain model.
        configs: N configs that differ only in `r` and `lora_alpha`.
        rngs: one per adapter.

    Raises:
        LoraError: if the configs differ in other fields, or for the same reasons as `wrap`.
    """
    if not configs or len(configs) != len(rngs):
        raise LoraError(
            "wrap_many takes at least one config and one rngs per config; got "
            f"{len(configs)} configs and {len(rngs)} rngs"
        )
    index = ModelIndex(model)
    if index.owners:
        raise LoraError("the model already has LoRA layers; unwrap it first")
    _refuse_differences(configs)
    starts = []
    for config, own in zip(configs, rngs, strict=True):
        insert(index, config, own, DEFAULT)
        starts.append([_arrays(adapter) for adapter in _adapters(index)])
        remove(index)
    insert(index, max(configs, key=lambda config: config.r), rngs[0], DEFAULT)
    adapters = _adapters(index)
    _refuse_groups(index, configs)
    members = []
    for start in starts:
        for adapter, arrays in zip(adapters, start, strict=True):
            _put(adapter, {name: _widened(adapter, name, a) for name, a in arrays.items()})
        # States split off by NNX share their variables with the model, so copy them.
        members.append(jax.tree.map(jnp.asarray, _split(index)[1:3]))
    graphdef, _, _, frozen = _split(index)
    trainable, constants = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(member[part] for member in members))
        for part in (0, 1)
    )
    return Many(tuple(configs), graphdef, trainable, constants, frozen)


def put_one(model: nnx.Module, many: Many, index: int) -> None:
    """Turns `model`, in place, into the base with adapter `index` alone, at its own rank.

    Args:
        model: the model passed to `wrap_many`, or an identical one.
        many: holds the trained arrays: `dataclasses.replace(many, trainable=trained)`.
        index: which adapter.
    """

    def one(state: State) -> State:
        member: State = jax.tree.map(lambda leaf: leaf[index], state)
        return member

    trainable = one(many.trainable)
    whole = nnx.merge(many.graphdef, trainable, one(many.constants), many.frozen)
    tree = ModelIndex(model)
    remove(tree)
    insert(tree, many.configs[index], None, DEFAULT)
    for adapter, source in zip(_adapters(tree), _adapters(ModelIndex(whole)), strict=True):
        arrays = _arrays(source)
        _put(adapter, {name: _narrowed(adapter, name, arrays[name]) for name in _arrays(adapter)})
    inside = {(*path, "adapters", DEFAULT) for path in tree.wrappers}
    rest = [
        (path, variable)
        for path, variable in nnx.to_flat_state(trainable)
        if path[:-1] not in inside
    ]
    nnx.update(model, nnx.from_flat_state(rest))


def _adapters(index: ModelIndex) -> list[Adapter]:
    return [layer.adapters[DEFAULT] for layer in index.wrappers.values()]


def _split(index: ModelIndex) -> tuple[nnx.GraphDef[Any], State, State, State]:
    """Splits into graphdef, trainable state, each adapter's constants, and the rest."""
    trains = trainable_filter(index)
    graphdef, *states = nnx.split(index.model, trains, nnx.Any(LoRAScale, LoRAStart), ...)
    trainable, constants, frozen = states
    return graphdef, trainable, constants, frozen


def _arrays(adapter: Adapter) -> dict[str, jax.Array]:
    names = ("lora_A", "lora_B", "lora_bias", "lora_magnitude", "scale", "start_A", "start_B")
    return {n: getattr(adapter, n)[...] for n in names if getattr(adapter, n) is not None}


def _put(adapter: Adapter, arrays: dict[str, jax.Array]) -> None:
    for name, array in arrays.items():
        getattr(adapter, name).set_value(array)


def _by_slice(adapter: Adapter, name: str, array: jax.Array) -> tuple[jax.Array, int]:
    """Gives A a separate axis for its slices; also returns the position of the rank axis."""
    if name.endswith("_A"):
        return array.reshape(*array.shape[:-1], len(adapter.spec.slices), -1), array.ndim
    return array, array.ndim - 2


def _widened(adapter: Adapter, name: str, array: jax.Array) -> jax.Array:
    """Zero-pads to the rank of the destination adapter."""
    if not name.endswith(("_A", "_B")):
        return array
    target = getattr(adapter, name)[...]
    parts, axis = _by_slice(adapter, name, array)
    width = _by_slice(adapter, name, target)[0].shape[axis]
    pads = [(0, 0)] * parts.ndim
    pads[axis] = (0, width - parts.shape[axis])
    return jnp.pad(parts, pads).reshape(target.shape)


def _narrowed(adapter: Adapter, name: str, array: jax.Array) -> jax.Array:
    """Truncates to the rank of the destination adapter."""
    if not name.endswith(("_A", "_B")):
        return array
    target = getattr(adapter, name)[...]
    parts, axis = _by_slice(adapter, name, array)
    width = _by_slice(adapter, name, target)[0].shape[axis]
    return jax.lax.slice_in_dim(parts, 0, width, axis=axis).reshape(target.shape)


def _refuse_differences(configs: Sequence[LoraConfig]) -> None:
    for field in dataclasses.fields(LoraConfig):
        values = {getattr(config, field.name) for config in configs}
        if field.name not in _OWN and len(values) > 1:
            raise LoraError(
                f"adapters trained together may differ only in {' and '.join(_OWN)}, not in "
                f"{field.name}: {', '.join(map(repr, values))}"
            )


def _refuse_groups(index: ModelIndex, configs: Sequence[LoraConfig]) -> None:
    if len({config.r for config in configs}) == 1:
        return
    for path, layer in index.wrappers.items():
        if isinstance(layer, LoRAConv) and layer.groups > 1:
            remove(index)
            raise LoraError(f"{dotted(path)} has groups; its adapters must have equal ranks")
