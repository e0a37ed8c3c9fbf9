"""Next-token cross-entropy without ever holding the logits of a whole batch.

Logits `[B, S, V]` in float32 are 6 GiB at 8 x 1024 x 200k. Here the head runs on one chunk of
tokens at a time, forward and backward (the chunk is recomputed in the backward pass), and only sums
leave.

Sums and counts are carried, never means: the loss of a step is the mean over the target tokens of
the whole global batch, however it was cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 512


class LossSums(NamedTuple):
    """Sums over target tokens, float32 scalars.

    Attributes:
        nll: of -log p(target).
        correct: of targets that are the most probable token.
        targets: how many.
    """

    nll: jax.Array
    correct: jax.Array
    targets: jax.Array


def next_token_loss(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    tokens: jax.Array,
    targets: jax.Array,
    chunk: int = CHUNK,
) -> LossSums:
    """Cross-entropy of each target token, predicted from the hidden state before it.

    Args:
        head: hidden states `[n, D]` to logits, float32 `[n, V]`.
        hidden: `[B, S, D]`.
        tokens: int32 `[B, S]`.
        targets: bool `[B, S]`, the tokens to be learnt. Column 0 has nothing before it and is
            never one; nor may be the first token of a packed segment.
        chunk: tokens whose logits are alive at a time.
    """
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    labels = tokens[:, 1:].reshape(-1)
    weights = targets[:, 1:].reshape(-1).astype(jnp.float32)
    chunk = min(chunk, labels.shape[0])
    pad = -labels.shape[0] % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    labels = jnp.pad(labels, (0, pad)).reshape(-1, chunk)
    weights = jnp.pad(weights, (0, pad)).reshape(-1, chunk)

    @jax.checkpoint
    def add_chunk(sums: LossSums, xs: tuple[jax.Array, ...]) -> tuple[LossSums, None]:
        hidden, labels, weights = xs
        logits = head(hidden)
        nll = jax.nn.logsumexp(logits, axis=-1)
        nll -= jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        # where, not a product: a masked token must not bring in an inf or nan of its own.
        nll = jnp.where(weights > 0, nll, 0.0)
        return LossSums(
            sums.nll + nll.sum(), sums.correct + (correct * weights).sum(), sums.targets
        ), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(
        add_chunk, LossSums(zero, zero, weights.sum()), (hidden, labels, weights)
    )
    return sums
