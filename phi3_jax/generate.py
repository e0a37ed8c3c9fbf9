"""Text generation: one prefill of the prompts, then one token a step from a key/value cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi3_jax.cache import KVCache
from phi3_jax.errors import UserError
from phi3_jax.model import Phi3

# Prompts are padded to a multiple of this, so that few prompt lengths mean few compilations.
PROMPT_BUCKET = 64


def generate(
    model: Phi3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt until a stop token or `max_new_tokens`.

    Args:
        model: with or without LoRA wrappers.
        prompts: token ids, one list a prompt, of any lengths; a prompt gives the same text alone as
            beside others.
        max_new_tokens: at most so many new tokens each.
        temperature: 0 takes the most probable token; above 0 samples from logits / temperature.
        top_p: sample from the fewest tokens whose probabilities reach this sum, in (0, 1].
        top_k: sample from the k most probable tokens; 0 is all of them.
        eos_ids: any of these ends its row.
        seed: of the sampling.

    Returns:
        The new tokens of each prompt; the stop token, where one was reached, is the last.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, a length beyond the model's, a
            sampling setting out of range, or generation across LongRoPE's original length (the
            cached keys would need other factors).
    """
    config = model.config
    _check(prompts, max_new_tokens, temperature, top_p, top_k, config)
    longest = max(map(len, prompts))
    width = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens = np.zeros((len(prompts), width), np.int32)
    segment_ids = np.zeros_like(tokens)
    positions = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # left-padded: all rows write the same cache slot
        tokens[row, width - len(prompt) :] = prompt
        segment_ids[row, width - len(prompt) :] = 1
        positions[row, width - len(prompt) :] = np.arange(len(prompt))
    graphdef, state = nnx.split(model)
    new_tokens, counts = _generate(
        graphdef,
        state,
        tokens,
        positions,
        segment_ids,
        jnp.asarray(eos_ids, jnp.int32).reshape(-1),
        jax.random.key(seed),
        temperature,
        top_p,
        max_new_tokens=max_new_tokens,
        top_k=min(top_k, config.vocab_size),
        greedy=temperature == 0.0,
    )
    rows = np.asarray(new_tokens)
    return [rows[i, :count].tolist() for i, count in enumerate(np.asarray(counts))]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "top_k", "greedy"))
def _generate(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    eos_ids: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    max_new_tokens: int,
    top_k: int,
    greedy: bool,
) -> tuple[jax.Array, jax.Array]:
    """New tokens `[B, max_new_tokens]` and how many of each row count `[B]`."""
    model: Phi3 = nnx.merge(graphdef, state)
    batch, width = tokens.shape

    def choose(hidden: jax.Array, step: jax.Array) -> jax.Array:
        logits = model.head(hidden[:, -1])  # [B, V]
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = restrict(logits / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, step), logits).astype(jnp.int32)

    dtype = model.model.norm.weight.dtype
    empty = KVCache.empty(model.config, batch, width + max_new_tokens, dtype)
    hidden, cache = model.model(tokens, positions, segment_ids, empty)
    ones = jnp.ones((batch, 1), jnp.int32)

    def running(carry) -> jax.Array:
        step, _, _, done, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def decode(carry):
        step, token, position, done, cache, out = carry
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
        done |= jnp.isin(token, eos_ids)
        hidden, cache = model.model(token[:, None], position, ones, cache)
        return step + 1, choose(hidden, step + 1), position + 1, done, cache, out

    first = choose(hidden, jnp.int32(0))
    done = jnp.zeros((batch,), bool)
    out = jnp.zeros((batch, max_new_tokens), jnp.int32)
    carry = (jnp.int32(0), first, positions[:, -1:] + 1, done, cache, out)
    step, *_, out = jax.lax.while_loop(running, decode, carry)
    written = jnp.arange(max_new_tokens) < step
    stops = jnp.isin(out, eos_ids) & written
    first_stop = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1) + 1, step)
    return out, first_stop


def restrict(logits: jax.Array, top_k: int, top_p: jax.Array | float) -> jax.Array:
    """Put `-inf` on the tokens that top-k and then top-p leave out, as transformers' warpers do.

    Args:
        logits: float32 `[B, V]`, already divided by the temperature.
        top_k: 0 keeps all. Ties with the k-th are kept.
        top_p: the smallest set of the most probable tokens whose probabilities sum to at least
            `top_p` is kept (Holtzman et al. 2019).
    """
    if top_k:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the more probable ones
    kept = jnp.zeros(logits.shape, bool)
    kept = jnp.put_along_axis(kept, order, before < top_p, axis=-1, inplace=False)
    return jnp.where(kept, logits, -jnp.inf)


def _check(prompts, max_new_tokens, temperature, top_p, top_k, config) -> None:
    problems = []
    if not prompts:
        problems.append("no prompts")
    for row, prompt in enumerate(prompts):
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if not len(prompt):
            problems.append(f"prompt {row} is empty")
        if outside:
            problems.append(
                f"prompt {row}: token ids {outside[:5]} are outside the vocabulary of "
                f"{config.vocab_size}; is this the model's own tokenizer?"
            )
        end = len(prompt) + max_new_tokens
        if end > config.max_position_embeddings:
            problems.append(
                f"prompt {row}: {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                f"model's {config.max_position_embeddings} positions"
            )
        original = config.original_max_position_embeddings
        if config.longrope is not None and len(prompt) <= original < end:
            problems.append(
                f"prompt {row}: {len(prompt)} tokens and {max_new_tokens} new ones cross the "
                f"original length {original}, where LongRoPE changes its factors; shorten it"
            )
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        problems.append(
            f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1], top_k {top_k} >= 0"
        )
    if problems:
        raise UserError("cannot generate: " + "; ".join(problems))
