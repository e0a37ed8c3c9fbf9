"""Text generation: one prefill of the prompts, then one token per step with a key/value cache.

When a row grows beyond LongRoPE's original length, the long factors apply to the whole row,
including the cached keys. That row's cache is then recomputed in one forward pass, as transformers
does. Rows that do not cross keep their cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi3_jax.errors import UserError, at_most_ten
from phi3_jax.generation.layers import LayerArrays, separate_layers
from phi3_jax.generation.prompts import prompt_problems
from phi3_jax.generation.sampling import Sampling, choose_token, setting_problems
from phi3_jax.model.cache import KVCache
from phi3_jax.model.network import Phi3

Graph = nnx.GraphDef[Phi3]
Arrays = nnx.State[Any, Any]
# Prompts are padded to a multiple of this to limit recompilation.
PROMPT_BUCKET = 64


class _Arrays(NamedTuple):
    """The model's arrays, and those of each layer if decoding reads these (`separate_layers`)."""

    model: Arrays
    layers: LayerArrays


def generate(
    model: Phi3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """Continue each prompt until a stop token or `max_new_tokens`.

    Args:
        model: a model with or without LoRA wrappers.
        prompts: token ids, one list per prompt, of any lengths. At temperature 0 a prompt gives the
            same text alone as in a batch.
        max_new_tokens: maximum new tokens per prompt: one number for all, or one for each.
        temperature: 0 takes the most probable token; above 0 samples from logits / temperature.
        top_p: sample from the smallest set of tokens whose probabilities reach this sum, in (0, 1].
        top_k: sample from the k most probable tokens; 0 means all.
        eos_ids: any of these ends its row.
        seed: seed for sampling; what is drawn also depends on the row.
        min_p: sample only from tokens at least this fraction as probable as the top one, in [0, 1].
        repetition_penalty: above 1 makes tokens already in the prompt or answer less probable, even
            at temperature 0.

    Returns:
        The new tokens of each prompt, including the stop token if one was reached.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, a length beyond the model's, or a
            sampling setting out of range.
    """
    if not isinstance(max_new_tokens, Sequence):
        max_new_tokens = [max_new_tokens] * len(prompts)
    inputs = _prepare(
        model, prompts, max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty
    )
    graphdef, state = nnx.split(model)
    stops = jnp.asarray(eos_ids, jnp.int32).reshape(-1)
    arrays = _Arrays(state, separate_layers(model))
    new_tokens, counts = _generate(graphdef, arrays, inputs, stops, jax.random.key(seed))
    rows = np.asarray(new_tokens)
    return [rows[i, :count].tolist() for i, count in enumerate(np.asarray(counts))]


def stream(
    model: Phi3,
    prompt: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Iterator[int]:
    """Yield the tokens of `generate` for one prompt as they are produced.

    Arguments and errors are those of `generate`; the last token is the stop token if one is
    reached.
    """
    inputs = _prepare(
        model, [prompt], [max_new_tokens], temperature, top_p, top_k, min_p, repetition_penalty
    )
    graphdef, state = nnx.split(model)
    arrays = _Arrays(state, separate_layers(model))
    stops = jnp.asarray(eos_ids, jnp.int32).reshape(-1)
    key = jax.random.key(seed)
    carry = _jit_begin(graphdef, state, inputs, key)
    for number in range(max_new_tokens):
        token = int(carry.token[0])
        yield token
        if token in eos_ids or number == max_new_tokens - 1:
            return
        carry = _jit_advance(graphdef, arrays, inputs, carry, stops, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Left-padded prompts, int32 `[B, W]`, and how to continue them.

    `limits` are the maximum new tokens of each row, int32 `[B]`; `max_new_tokens` is the largest.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    limits: jax.Array
    sampling: Sampling
    max_new_tokens: int = dataclasses.field(metadata={"static": True})
    crosses: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """State of a generation in progress.

    Attributes:
        step: int32, number of new tokens in the cache.
        token: int32 `[B]`, chosen but not yet run.
        position: int32 `[B, 1]`, position of that token.
        done: bool `[B]`.
        cache: the key/value cache, with all slots.
        tokens: int32 `[B, T]`, the tokens in the slots.
        seen: bool `[B, V]`, if sampling uses a repetition penalty.
    """

    step: jax.Array
    token: jax.Array
    position: jax.Array
    done: jax.Array
    cache: KVCache
    tokens: jax.Array
    seen: jax.Array | None


def _prepare(
    model: Phi3,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
) -> _Inputs:
    config = model.config
    problems = [
        *prompt_problems(prompts, limits, config),
        *setting_problems(temperature, top_p, top_k, min_p, repetition_penalty),
    ]
    if problems:
        raise UserError("cannot generate: " + "; ".join(at_most_ten(problems)))
    longest = max(map(len, prompts))
    width = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens = np.zeros((len(prompts), width), np.int32)
    segment_ids = np.zeros_like(tokens)
    positions = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # left-padded, so all rows write the same cache slot
        tokens[row, width - len(prompt) :] = prompt
        segment_ids[row, width - len(prompt) :] = 1
        positions[row, width - len(prompt) :] = np.arange(len(prompt))
    sampling = Sampling(
        temperature,
        top_p,
        min_p,
        repetition_penalty,
        top_k=min(top_k, config.vocab_size),
        greedy=temperature == 0.0,
        penalized=repetition_penalty != 1.0,
    )
    original = config.original_max_position_embeddings
    by_length = config.longrope is not None and config.longrope.choice in ("by_text", "by_batch")
    crosses = by_length and any(
        len(prompt) <= original < len(prompt) + limit
        for prompt, limit in zip(prompts, limits, strict=True)
    )
    return _Inputs(
        jnp.asarray(tokens),
        jnp.asarray(positions),
        jnp.asarray(segment_ids),
        jnp.asarray(limits, jnp.int32),
        sampling,
        max(limits),
        crosses,
    )


def _begin(model: Phi3, inputs: _Inputs, key: jax.Array) -> _Carry:
    """Run the prompts and choose the first new tokens."""
    batch, width = inputs.tokens.shape
    dtype = jax.eval_shape(model.model.embed_tokens, inputs.tokens).dtype
    empty = KVCache.empty(model.config, batch, width + inputs.max_new_tokens, dtype)
    hidden, cache = model.model(inputs.tokens, inputs.positions, inputs.segment_ids, empty)
    assert cache is not None
    seen = None
    if inputs.sampling.penalized:
        seen = _seen(inputs.tokens, inputs.segment_ids, model.config.vocab_size)
    return _Carry(
        step=jnp.int32(0),
        token=_choose(model, inputs, hidden, seen, jnp.int32(0), key),
        position=jnp.asarray(inputs.positions)[:, -1:] + 1,
        done=jnp.zeros((batch,), bool),
        cache=cache,
        tokens=jnp.pad(inputs.tokens, ((0, 0), (0, inputs.max_new_tokens))),
        seen=seen,
    )


def _advance(
    model: Phi3,
    layers: LayerArrays,
    inputs: _Inputs,
    carry: _Carry,
    eos_ids: jax.Array,
    key: jax.Array,
) -> _Carry:
    """Run the chosen tokens and choose the next."""
    batch, width = inputs.tokens.shape
    token, step, position = carry.token, carry.step, carry.position
    tokens = jax.lax.dynamic_update_slice(carry.tokens, token[:, None], (0, width + step))
    seen = None if carry.seen is None else carry.seen.at[jnp.arange(batch), token].set(True)
    done = carry.done | jnp.isin(token, eos_ids) | (step + 1 >= inputs.limits)
    ones = jnp.ones((batch, 1), jnp.int32)
    hidden, cache = model.model(token[:, None], position, ones, carry.cache, layers=layers)
    assert cache is not None
    if inputs.crosses and (longrope := model.config.longrope):
        crossing = position[:, 0] == model.config.original_max_position_embeddings
        if longrope.choice == "by_batch":
            crossing = jnp.broadcast_to(crossing.any(), crossing.shape)
        hidden, cache = _cross(model, tokens, crossing & ~done, hidden, cache)
    chosen = _choose(model, inputs, hidden, seen, step + 1, key)
    return _Carry(step + 1, chosen, position + 1, done, cache, tokens, seen)


def _choose(
    model: Phi3,
    inputs: _Inputs,
    hidden: jax.Array,
    seen: jax.Array | None,
    step: jax.Array,
    key: jax.Array,
) -> jax.Array:
    logits = model.head(hidden[:, -1])  # [B, V]
    return choose_token(logits, inputs.sampling, seen, jax.random.fold_in(key, step))


@functools.partial(jax.jit, static_argnums=0)
def _jit_begin(graphdef: Graph, state: Arrays, inputs: _Inputs, key: jax.Array) -> _Carry:
    return _begin(nnx.merge(graphdef, state), inputs, key)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _jit_advance(
    graphdef: Graph,
    arrays: _Arrays,
    inputs: _Inputs,
    carry: _Carry,
    eos_ids: jax.Array,
    key: jax.Array,
) -> _Carry:
    model = nnx.merge(graphdef, arrays.model)
    return _advance(model, arrays.layers, inputs, carry, eos_ids, key)


@functools.partial(jax.jit, static_argnums=0)
def _generate(
    graphdef: Graph, arrays: _Arrays, inputs: _Inputs, eos_ids: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """New tokens `[B, max_new_tokens]` and the number of valid ones per row `[B]`."""
    model = nnx.merge(graphdef, arrays.model)

    def running(carry: _Carry) -> jax.Array:
        return (carry.step < inputs.max_new_tokens) & ~jnp.all(carry.done)

    def decode(carry: _Carry) -> _Carry:
        return _advance(model, arrays.layers, inputs, carry, eos_ids, key)

    carry = jax.lax.while_loop(running, decode, _begin(model, inputs, key))
    out = carry.tokens[:, inputs.tokens.shape[1] :]
    written = jnp.arange(inputs.max_new_tokens) < carry.step
    stops = jnp.isin(out, eos_ids) & written
    first_stop = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1) + 1, carry.step)
    return out, jnp.minimum(first_stop, inputs.limits)


def _cross(
    model: Phi3, tokens: jax.Array, crossing: jax.Array, hidden: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Recompute the cache of the crossing rows with the long factors.

    Args:
        model: the network.
        tokens: int32 `[B, T]`, the tokens in the cache slots.
        crossing: bool `[B]`, rows that exceed the original length with the newest token.
        hidden: `[B, 1, D]`, hidden state of the newest token.
        cache: the cache, extended by that token.

    Returns:
        `hidden` and `cache`, changed only for the crossing rows.
    """

    def again(_: None) -> tuple[jax.Array, KVCache]:
        batch, slots = tokens.shape
        empty = KVCache.empty(model.config, batch, slots, cache.keys.dtype)
        everything, fresh = model.model(tokens, cache.positions, cache.segment_ids, empty)
        assert fresh is not None
        newest = jax.lax.dynamic_slice_in_dim(everything, cache.length - 1, 1, axis=1)
        row = crossing[:, None, None]
        keys = jnp.where(row[None, :, None], fresh.keys, cache.keys)
        values = jnp.where(row[None, :, None], fresh.values, cache.values)
        changed = dataclasses.replace(cache, keys=keys, values=values)
        return jnp.where(row, newest, hidden), changed

    result: tuple[jax.Array, KVCache]
    result = jax.lax.cond(crossing.any(), again, lambda _: (hidden, cache), None)
    return result


def _seen(tokens: jax.Array, segment_ids: jax.Array, vocab_size: int) -> jax.Array:
    """Which tokens occur in each row, bool `[B, V]`; padding does not count."""
    rows = jnp.broadcast_to(jnp.arange(tokens.shape[0])[:, None], tokens.shape)
    seen = jnp.zeros((tokens.shape[0], vocab_size), bool)
    return seen.at[rows, tokens].max(segment_ids > 0)
