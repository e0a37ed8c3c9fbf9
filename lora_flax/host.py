"""Moves arrays to and from the host, with one process or several."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The full array on the host; if it is sharded across processes, all of them must call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def place_like(old: jax.Array, value: np.ndarray) -> jax.Array:
    """Places the value on the same devices as a committed array; otherwise leaves it to jit."""
    placed = getattr(old, "committed", False)
    return jax.device_put(value, old.sharding) if placed else jnp.asarray(value)
