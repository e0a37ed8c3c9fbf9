"""NEFTune (Jain et al. 2023, arXiv:2310.05914): noise on the embeddings while training."""

from __future__ import annotations

import math

import jax

# Sets the noise's random numbers apart from those of the layers, whose keys are split off.
_NOISE = 0x4E_EF


def neftune(x: jax.Array, alpha: float, key: jax.Array | None) -> jax.Array:
    """Embeddings `[B, S, D]` with uniform noise of magnitude `alpha / sqrt(S D)`.

    As in transformers, S is the length of the padded row, and padding gets noise too.

    Args:
        x: the embeddings.
        alpha: 0 adds none.
        key: PRNG key; None adds none.
    """
    if key is None or not alpha:
        return x
    bound = alpha / math.sqrt(x.shape[1] * x.shape[2])
    key = jax.random.fold_in(key, _NOISE)
    return x + jax.random.uniform(key, x.shape, x.dtype, -bound, bound)
