"""The device mesh and how every array is sharded over it.

Three axes: `data` (weights replicated, batch rows split), `fsdp` (batch rows split and weights
sharded, gathered layer by layer where used) and `tensor` (each matmul split). The rules are one
table keyed by module name; the modules themselves do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from phi3_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Share of a device's memory for weights; the rest is for activations, adapter and optimizer.
WEIGHT_SHARE = 0.5

# Mesh axes for a weight's inputs and outputs. Projections into heads or the MLP split their outputs
# over `tensor`, projections back split their inputs, so no communication is needed in between.
_RULES: dict[str, tuple[str, str]] = {
    "embed_tokens": ("tensor", "fsdp"),
    "qkv_proj": ("fsdp", "tensor"),
    "gate_up_proj": ("fsdp", "tensor"),
    "o_proj": ("tensor", "fsdp"),
    "down_proj": ("tensor", "fsdp"),
    "lm_head": ("fsdp", "tensor"),
}


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over as many devices as the axes need; one axis may be -1 to take all the rest.

    Raises:
        UserError: the axes do not fit the available devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    wrong = [name for name, size in sizes.items() if size != -1 and size < 1]
    if wrong or len(free) > 1 or fixed > len(devices) or (free and len(devices) % fixed):
        raise UserError(
            f"mesh data {data} x fsdp {fsdp} x tensor {tensor} does not fit {len(devices)} "
            "devices: the axes multiply to at most their number, and one of them may be -1"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes[name] for name in AXES)
    used = devices[: int(np.prod(shape))]
    if idle := {d.process_index for d in devices} - {d.process_index for d in used}:
        raise UserError(
            f"mesh data {sizes['data']} x fsdp {sizes['fsdp']} x tensor {sizes['tensor']} leaves "
            f"processes {sorted(idle)} without a device: with several processes all of the "
            f"{len(devices)} devices must be used"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=used)


def choose_axes(weights: int, devices: int, memory: int | None) -> tuple[int, int, int]:
    """Sizes of `data`, `fsdp` and `tensor` for a run over all devices.

    Replicating the frozen weights costs no communication beyond the adapter's small gradients, so
    weights are sharded only as far as necessary.

    Args:
        weights: bytes of the frozen weights.
        devices: number of devices.
        memory: bytes of memory per device; None if unknown, which shards weights over all devices.
    """
    if memory is None:
        return 1, devices, 1
    cuts = (n for n in range(1, devices + 1) if devices % n == 0)
    fsdp = next((n for n in cuts if weights / n <= WEIGHT_SHARE * memory), devices)
    return devices // fsdp, fsdp, 1


def spec_of(path: Iterable[str], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition spec of one array of the model.

    LoRA's A is sharded like its weight's inputs, B like the outputs. A mesh axis that does not
    divide its dimension is dropped, and arrays without a rule are replicated.

    Args:
        path: names of the modules and the parameter.
        shape: shape of the array; leading axes beyond those of the rule are layers and not split.
        mesh: the mesh, for its axis sizes.
    """
    path = list(path)
    rule = next((_RULES[name] for name in path if name in _RULES), None)
    if rule is None or len(shape) < 2:
        return PartitionSpec()
    last: tuple[str | None, str | None]
    unit = 1
    if path[-1] in ("kernel", "embedding", "codes", "absmax"):
        last = rule
        # In a quantized kernel, 32 bytes hold one block of 64 inputs, which must not be split.
        unit = 32 if path[-1] == "codes" else 1
    elif path[-1] == "lora_A":
        last = (rule[0], None)
    elif path[-1] == "lora_B":
        last = (None, rule[1])
    else:
        return PartitionSpec()
    fitting = [
        axis if axis is not None and size % (mesh.shape[axis] * unit) == 0 else None
        for axis, size, unit in zip(last, shape[-2:], (unit, 1), strict=True)
    ]
    return PartitionSpec(*[None] * (len(shape) - 2), *fitting)


def state_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """The sharding of each array of a state, as a tree of the same structure."""
    return shardings_at((), state, mesh)


def shardings_at(path: tuple[str, ...], tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of the part of a state that is found at the path."""

    def of(below, leaf) -> NamedSharding:
        return NamedSharding(mesh, spec_of((*path, *_names(below)), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Place arrays according to the shardings; each process fills the part its devices hold.

    Args:
        tree: arrays that are already on a mesh, or that every process holds in full.
        shardings: one sharding for all, or a tree of the same structure.
    """

    def one(array: jax.Array | np.ndarray, sharding: Sharding) -> jax.Array:
        spread = isinstance(array, jax.Array) and not array.is_fully_addressable
        if spread or sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        # device_put would first compare the array across all processes.
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda array: one(array, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def gathered(state: nnx.State, module: str) -> nnx.State:
    """The state with one module's arrays gathered over `fsdp`; needs jit and a mesh in context.

    For a module used in a loop, where the compiler would otherwise gather its weights on every
    iteration.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return state

    def of(path, leaf):
        names = _names(path)
        if module not in names:
            return leaf
        spec = (None if axis == "fsdp" else axis for axis in spec_of(names, leaf.shape, mesh))
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(of, state)


def _names(path: Sequence[Any]) -> list[str]:
    names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
    return [name for name in names if name != "value"]


def optimizer_shardings(
    tx: optax.GradientTransformation, trainable: nnx.State, mesh: Mesh
) -> optax.OptState:
    """Moments are sharded like their parameter; counters are replicated."""
    shardings = state_shardings(trainable, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    return optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, trainable),
        shardings,
        transform_non_params=lambda _: whole,
    )


def row_devices(mesh: Mesh) -> int:
    """Number of devices that the rows of a batch are spread over."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Split rows over `data` and `fsdp`; the `leading` axes before the rows are not split."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES))
