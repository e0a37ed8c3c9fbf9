"""What all kernels share: where they run, and how rows are padded to their blocks."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

# The interpreted versions run anywhere, for tests.
Platform = Literal["tpu", "gpu", "tpu_interpreted", "gpu_interpreted"]


def is_interpreted(platform: Platform) -> bool:
    """Whether the kernel runs as plain JAX, one block after the other."""
    return platform.endswith("_interpreted")


def padded(x: jax.Array, multiple: int, axis: int = 0) -> jax.Array:
    """Zero-pads one axis of a matrix to a multiple."""
    pads = [(0, 0), (0, 0)]
    pads[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, pads)
