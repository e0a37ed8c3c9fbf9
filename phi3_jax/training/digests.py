"""A digest of an array that does not depend on how the array is spread over devices.

Every element is mixed with its position in the whole array, and the results are added modulo 2^32,
in two lanes. A sum is the same in any order, so each device adds up its own elements and no array
is gathered. The mixing is a bijection (the finalizer "lowbias32" of C. Wellons' hash prospector):
one changed element always changes the digest; several do so but for one case in 2^64.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

_LANES = (0x9E3779B9, 0x85EBCA6B)


class Digest(NamedTuple):
    """What is known about an array after one pass over it."""

    text: str  # 16 hexadecimal digits
    finite: bool


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, Digest]:
    """The digest of every array; if they are spread over processes, all of them must call this.

    Args:
        arrays: of any shape, with elements of 1, 2, 4 or 8 bytes.
    """
    started = {name: _compiled(_mesh(array))(array) for name, array in arrays.items()}
    return {
        name: Digest("".join(f"{int(lane):08x}" for lane in lanes), bool(finite))
        for name, (lanes, finite) in jax.device_get(started).items()
    }


def _mesh(array: jax.Array) -> Mesh | AbstractMesh | None:
    sharding = array.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


@functools.cache
def _compiled(mesh: Mesh | AbstractMesh | None) -> jax.stages.Wrapped:
    # Every process reads the sums, so each must hold them.
    return jax.jit(
        _sums, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec())
    )


def _sums(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums `[2]`, and whether all elements are finite."""
    words = _words(array)
    lanes = []
    for seed in _LANES:
        position = jnp.full(words.shape, seed, jnp.uint32)
        for axis, size in enumerate(words.shape):
            counted = jnp.arange(size, dtype=jnp.uint32) + np.uint32(seed + axis & 0xFFFFFFFF)
            own = _mix(counted * np.uint32(2 * axis + 1))
            position += own.reshape([-1 if n == axis else 1 for n in range(words.ndim)])
        lanes.append(jnp.sum(_mix(words ^ position), dtype=jnp.uint32))
    inexact = jnp.issubdtype(array.dtype, jnp.inexact)
    return jnp.stack(lanes), jnp.isfinite(array).all() if inexact else jnp.bool_(True)


def _words(array: jax.Array) -> jax.Array:
    """The bits of the elements as uint32; one of 8 bytes makes two, on a last axis."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    size = min(array.dtype.itemsize, 4)
    bits: jax.Array = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * size}"))
    return bits.astype(jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
    word = (word ^ (word >> 16)) * np.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * np.uint32(0x846CA68B)
    return word ^ (word >> 16)
