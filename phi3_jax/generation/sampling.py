"""Choose the next token from logits: repetition penalty, temperature, top-k, top-p, min-p.

Matches transformers' logits processors and warpers, in the same order.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings. Those that change the compiled program are static; the rest are not.

    Attributes:
        temperature: above 0; unused if greedy.
        top_p, min_p, repetition_penalty: see `choose_token`.
        top_k: static.
        greedy: take the most probable token. Static.
        penalized: whether the penalty differs from 1, which requires tracking seen tokens. Static.
    """

    temperature: jax.Array | float
    top_p: jax.Array | float
    min_p: jax.Array | float
    repetition_penalty: jax.Array | float
    top_k: int = dataclasses.field(metadata={"static": True})
    greedy: bool = dataclasses.field(metadata={"static": True})
    penalized: bool = dataclasses.field(metadata={"static": True})


def setting_problems(
    temperature: float, top_p: float, top_k: int, min_p: float, repetition_penalty: float
) -> list[str]:
    """What is wrong with sampling settings, one line per setting out of range."""
    checks = [
        (temperature >= 0, f"temperature must be at least 0, not {temperature}"),
        (0 < top_p <= 1, f"top_p must be in (0, 1], not {top_p}"),
        (top_k >= 0, f"top_k must be at least 0, not {top_k}"),
        (0 <= min_p <= 1, f"min_p must be in [0, 1], not {min_p}"),
        (repetition_penalty > 0, f"repetition_penalty must be above 0, not {repetition_penalty}"),
    ]
    return [problem for valid, problem in checks if not valid]


def choose_token(
    logits: jax.Array, sampling: Sampling, seen: jax.Array | None, key: jax.Array
) -> jax.Array:
    """The next token of each row, int32 `[B]`.

    Args:
        logits: float32 `[B, V]`.
        sampling: the settings.
        seen: bool `[B, V]`, tokens in the prompt and the answer so far, if `penalized`.
        key: PRNG key of this step.
    """
    if seen is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = restrict(logits / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Make seen tokens less probable: divide positive logits, multiply others (Keskar 2019)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def restrict(
    logits: jax.Array,
    top_k: int,
    top_p: jax.Array | float,
    min_p: jax.Array | float = 0.0,
) -> jax.Array:
    """Set tokens excluded by top-k, then top-p, then min-p to `-inf`.

    Args:
        logits: float32 `[B, V]`, already divided by the temperature.
        top_k: 0 keeps all. Ties with the k-th are kept.
        top_p: the smallest set of the most probable tokens whose probabilities sum to at least
            `top_p` is kept (Holtzman et al. 2019).
        min_p: tokens with probability below `min_p` times the highest are dropped (Nguyen et al.
            2024, arXiv:2407.01082); 0 keeps all.
    """
    if top_k:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of more probable tokens
    kept = jnp.zeros(logits.shape, bool)
    kept = jnp.put_along_axis(kept, order, before < top_p, axis=-1, inplace=False)
    logits = jnp.where(kept, logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits, axis=-1)
    highest = probabilities.max(axis=-1, keepdims=True)
    return jnp.where(probabilities < min_p * highest, -jnp.inf, logits)
