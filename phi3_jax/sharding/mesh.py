"""The device mesh, and placing arrays on it.

Four axes: `data` (weights replicated, batch rows split), `fsdp` (batch rows split and weights
sharded, gathered layer by layer where used), `sequence` (each row split along its tokens, weights
sharded as by `fsdp`; see `phi3_jax.model.sequence`) and `tensor` (each matmul split). How a model's
arrays are sharded over them is in `phi3_jax.sharding.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from phi3_jax.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")
# In a sweep, this axis takes the place of `data`: its devices have members, not rows, of their own.
MEMBER = "member"
# Share of a device's memory for weights; the rest is for activations, adapter and optimizer.
WEIGHT_SHARE = 0.5


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over as many devices as the axes need; one axis may be -1 to take the remaining ones.

    Raises:
        UserError: the axes do not fit the available devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    wrong = [name for name, size in sizes.items() if size != -1 and size < 1]
    if wrong or len(free) > 1 or fixed > len(devices) or (free and len(devices) % fixed):
        raise UserError(
            f"mesh {describe(sizes)} does not fit {len(devices)} devices: the product of the axes "
            "may be at most that number, and at most one axis can be -1, if the others divide that "
            "number"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes[name] for name in AXES)
    used = devices[: int(np.prod(shape))]
    if idle := {d.process_index for d in devices} - {d.process_index for d in used}:
        raise UserError(
            f"mesh {describe(sizes)} leaves processes {sorted(idle)} without a device: a "
            f"multi-process run must use all {len(devices)} devices"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=used)


def for_members(mesh: Mesh, members: int) -> Mesh:
    """The mesh with its `data` axis as `member`, and a `data` axis of size 1.

    Raises:
        UserError: that axis is larger than the number of members.
    """
    shape = dict(mesh.shape)
    if shape["data"] > members:
        raise UserError(f"mesh.data: {shape['data']} is more than the sweep's members, {members}")
    sizes = (shape.pop("data"), 1, *shape.values())
    devices, names = mesh.devices.reshape(sizes), (MEMBER, *AXES)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def describe(sizes: Mapping[str, int]) -> str:
    """The axes of a mesh and their sizes, such as `data 2 x fsdp 4`; `sequence` if it is used."""
    shown = [name for name in sizes if name != "sequence" or sizes[name] != 1]
    return " x ".join(f"{name} {sizes[name]}" for name in shown)


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


def for_at_most(members: int, data: int, fsdp: int, all_devices: bool) -> tuple[int, int]:
    """Sizes of `data` and `fsdp` (see `choose_axes`) for a sweep with that many members.

    Devices without a member are idle, unless all are needed, as in a run of several processes; then
    the weights are cut further.
    """
    if members >= data or not all_devices:
        return min(data, members), fsdp
    devices = data * fsdp
    groups = max(n for n in range(1, members + 1) if devices % n == 0)
    return groups, devices // groups


def place(tree: Any, shardings: Any) -> Any:
    """Place arrays according to the shardings; each process fills the part its devices hold.

    Args:
        tree: arrays that are already on a mesh, or that every process holds in full.
        shardings: one sharding for all, or a tree of the same structure.
    """

    def one(array: jax.Array | np.ndarray, sharding: Sharding) -> jax.Array:
        spread = isinstance(array, jax.Array) and not array.is_fully_addressable
        if spread or sharding.is_fully_addressable:
            placed: jax.Array = jax.device_put(array, sharding)
            return placed
        # device_put would first compare the array across all processes.
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda array: one(array, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def row_devices(mesh: Mesh) -> int:
    """Number of devices that the rows of a batch are spread over."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def token_devices(mesh: Mesh) -> int:
    """Number of devices that the tokens of a batch are spread over."""
    return row_devices(mesh) * int(mesh.shape["sequence"])


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Split rows over `data` and `fsdp`, and each along its tokens over `sequence`.

    The `leading` axes before the rows are not split.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES, "sequence"))
