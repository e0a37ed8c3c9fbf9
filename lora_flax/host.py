"""Arrays to and from the host, for one process or several."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array; where it lies on several processes, all of them must ask for it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def place_like(old: jax.Array, value: np.ndarray) -> jax.Array:
    """The value on the devices of an array that was placed; others go where jit wants them."""
    placed = getattr(old, "committed", False)
    return jax.device_put(value, old.sharding) if placed else jnp.asarray(value)
