"""Arrays from devices to the host, of one process or of several."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array; where it lies on several processes, all of them must ask for it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
