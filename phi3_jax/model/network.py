"""The Phi-3 network in Flax NNX. Names and fused projections are Hugging Face's.

The decoder layers are one `Phi3DecoderLayer` whose arrays have a leading layer axis, run with
`jax.lax.scan`, so compile time and program size do not grow with depth. Such a stack stores its
number of layers in a static attribute, `stack_size`, so code that walks the modules can distinguish
it from a single layer. NNX defines and holds the modules; only its `split` and `merge` run inside
jitted functions.

Every wrappable layer is called as `layer(x, *, key=None)`. The network itself uses no randomness;
it only passes each layer its own key, for wrappers that need one (LoRA's dropout).

Shapes: B rows, S tokens, D hidden_size, F intermediate_size, N heads, K key/value heads,
H head_dim, V vocab_size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from phi3_jax.model.attention import (
    Implementation,
    attention,
    heads_first,
    implementation_for,
    join_output,
    split_projection,
)
from phi3_jax.model.blockwise import Tokens
from phi3_jax.model.cache import KVCache
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.heads import Rotary
from phi3_jax.model.noise import neftune
from phi3_jax.model.norm import RMSNorm
from phi3_jax.model.remat import Remat, rematerialized, saved
from phi3_jax.model.rope import default_positions, rotary_tables
from phi3_jax.model.sequence import cut
from phi3_jax.model.stack import member_of, split_stack
from phi3_jax.model.swiglu import Kernel, swiglu

Key = jax.Array | None


class Dense(nnx.Module):
    """`x @ kernel`, with `kernel` `[in, out]`, or `[layer, in, out]` in a stack.

    Attributes:
        slices: for a fused projection, the name and columns of each projection it holds.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        slices: tuple[tuple[str, int], ...] = (),
    ):
        self.kernel = nnx.Param(_normal(rngs, shape, std, dtype))
        self.slices = slices

    def __call__(self, x: jax.Array, *, key: Key = None) -> jax.Array:
        del key  # deterministic; accepted so that a wrapper can replace this layer
        return x @ self.kernel[...].astype(x.dtype)


class Embed(nnx.Module):
    """Token embedding, `embedding` `[V, D]`.

    Attributes:
        tied_head: name of the output head that reads the same weight; None if it has its own.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        tied_head: str | None = None,
    ):
        self.embedding = nnx.Param(_normal(rngs, shape, std, dtype))
        self.tied_head = tied_head

    @jax.named_scope("embed_tokens")
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[...][tokens]

    def attend(self, x: jax.Array) -> jax.Array:
        """Tied output head: scores of `x` `[..., D]` against every row, `[..., V]`."""
        if x.size == x.shape[-1]:
            # One position: this way round, XLA's CPU backend uses all cores.
            return (self.embedding[...] @ x.reshape(-1)).reshape(*x.shape[:-1], -1)
        return x @ self.embedding[...].T


class TiedHead(nnx.Module):
    """Output head that reads the embedding's weight, whose shape `(D, V)` is `tied_shape`."""

    def __init__(self, shape: tuple[int, int]):
        self.tied_shape = shape

    def __call__(self, x: jax.Array, embedding: Embed) -> jax.Array:
        return embedding.attend(x)


class Phi3Attention(nnx.Module):
    """Grouped-query attention with one fused projection, columns in the order q, k, v."""

    def __init__(self, config: Phi3Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, std = config.hidden_size, config.initializer_range
        sizes = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        shape = (d, sum(sizes.values()))
        self.qkv_proj = Dense(shape, std, dtype, rngs, tuple(sizes.items()))
        self.o_proj = Dense((config.q_size, d), std, dtype, rngs)
        self.config = config
        self.implementation: Implementation = "xla"

    def __call__(
        self,
        x: jax.Array,
        rotary: Rotary,
        tokens: Tokens,
        layer: jax.Array,
        cache: KVCache | None,
        key: Key,
    ) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        qkv_key, o_key = _split(key, 2)
        with jax.named_scope("qkv_proj"):
            qkv = self.qkv_proj(x, key=qkv_key)  # [B, S, (N + 2K) H]
        in_order = cache is None
        kernel = implementation_for(self.implementation, in_order, *x.shape[:2])
        q, k, v = split_projection(qkv, rotary, config, kernel)  # [B, S, N, H] and [B, S, K, H]
        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cache.read(layer)  # [B, T, K, H]
        window, scaled = config.sliding_window, heads_first(kernel)
        out = join_output(attention(q, k, v, tokens, window, in_order, kernel, scaled), kernel)
        with jax.named_scope("o_proj"):
            return self.o_proj(out, key=o_key), cache


class Phi3MLP(nnx.Module):
    """SwiGLU (Shazeer 2020) with one fused projection, columns in the order gate, up."""

    def __init__(self, config: Phi3Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, f, std = config.hidden_size, config.intermediate_size, config.initializer_range
        slices = (("gate_proj", f), ("up_proj", f))
        self.gate_up_proj = Dense((d, 2 * f), std, dtype, rngs, slices)
        self.down_proj = Dense((f, d), std, dtype, rngs)
        self.kernel: Kernel = None

    def __call__(self, x: jax.Array, key: Key) -> jax.Array:
        up_key, down_key = _split(key, 2)
        with jax.named_scope("gate_up_proj"):
            gate_up = self.gate_up_proj(x, key=up_key)  # [B, S, 2 F]
        activated = swiglu(gate_up, self.kernel)
        with jax.named_scope("down_proj"):
            return self.down_proj(activated, key=down_key)


class Phi3DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    Attributes:
        stack_size: number of layers along the arrays' leading axis; None for a single layer.
    """

    def __init__(self, config: Phi3Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.stack_size: int | None = None
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Phi3Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = Phi3MLP(config, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rotary: Rotary,
        tokens: Tokens,
        layer: jax.Array,
        cache: KVCache | None,
        key: Key,
    ) -> tuple[jax.Array, KVCache | None]:
        attn_key, mlp_key = _split(key, 2)
        with jax.named_scope("self_attn"):
            y, cache = self.self_attn(
                self.input_layernorm(x), rotary, tokens, layer, cache, attn_key
            )
            x = saved(x + y, "residual")
        with jax.named_scope("mlp"):
            return x + self.mlp(self.post_attention_layernorm(x), mlp_key), cache


class Phi3Model(nnx.Module):
    """Embedding, decoder layer stack and final norm."""

    def __init__(self, config: Phi3Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        head = "lm_head" if config.tie_word_embeddings else None
        self.embed_tokens = Embed(shape, config.initializer_range, dtype, rngs, head)
        self.layers = _stack(config, dtype, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.config = config

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: KVCache | None = None,
        key: Key = None,
        remat: Remat = "none",
        neftune_noise_alpha: float = 0.0,
        layers: Sequence[nnx.State[Any, Any]] = (),
    ) -> tuple[jax.Array, KVCache | None]:
        """Return the hidden states `[B, S, D]` and the cache extended by these tokens.

        With the arrays of each layer in `layers`, the layers run without a loop (and without
        `remat`), and the stack is not read.
        """
        if cache is not None:
            cache = cache.extend(positions, segment_ids)
        seen = (cache.positions, cache.segment_ids) if cache else (positions, segment_ids)
        attended = Tokens(positions, segment_ids, *seen)
        rotary = rotary_tables(self.config, positions, segment_ids)

        graphdef, state, whole = split_stack(self.layers)
        count = self.config.num_hidden_layers
        keys = None if key is None else jax.random.split(key, count)

        def run_layer(carry: Any, xs: Any) -> Any:
            layer_state, layer, layer_key = xs
            decoder_layer = nnx.merge(graphdef, layer_state, member_of(whole, layer))
            return decoder_layer(carry[0], rotary, attended, layer, carry[1], layer_key), None

        # With a cache, a few new tokens are exchanged faster than the weights of each layer.
        x = self.embed_tokens(tokens) if cache else cut(self.embed_tokens(tokens))
        carry = (neftune(x, neftune_noise_alpha, key), cache)
        for index, layer_state in enumerate(layers):
            carry, _ = run_layer(carry, (layer_state, index, None if keys is None else keys[index]))
        if not layers:
            xs = (state, jnp.arange(count), keys)
            carry, _ = jax.lax.scan(rematerialized(run_layer, remat), carry, xs)
        x, cache = carry
        return self.norm(x), cache


class Phi3(nnx.Module):
    """Phi-3 with its language-model head.

    Args:
        config: the architecture.
        rngs: source of the random initial weights (normal, `initializer_range`).
        dtype: dtype of weights and activations; norms, rotary angles, softmax and logits are always
            computed in float32.
    """

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype | str = "float32"):
        dtype = jnp.dtype(dtype)
        self.config = config
        self.model = Phi3Model(config, dtype, rngs)
        shape = (config.hidden_size, config.vocab_size)
        self.lm_head: Any = TiedHead(shape)
        if not config.tie_word_embeddings:
            self.lm_head = Dense(shape, config.initializer_range, dtype, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        key: Key = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """Next-token logits at every position.

        Args:
            tokens: int32 `[B, S]`, each in `[0, vocab_size)` (cannot be checked under jit; an id
                out of range uses the nearest row).
            positions: int32 `[B, S]`, counted from 0 in each segment; by default from 0 in the row.
            segment_ids: int32 `[B, S]`, 0 for padding; tokens attend only to their own segment. By
                default each row is one segment.
            key: PRNG key for wrappers with dropout; None is deterministic.
            remat: what the backward pass recomputes instead of storing: `none`; `dots`, all but
                matmul results; `full`, each whole layer; `offload`, like `dots` but with the matmul
                results in host memory; a tuple, all but the values it names
                (`phi3_jax.model.remat`).

        Returns:
            float32 `[B, S, V]`.
        """
        return self.head(self.hidden_states(tokens, positions, segment_ids, key=key, remat=remat))

    def hidden_states(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        key: Key = None,
        remat: Remat = "none",
        neftune_noise_alpha: float = 0.0,
    ) -> jax.Array:
        """The head's input: `[B, S, D]` after the final norm.

        Arguments as in `__call__`, and `neftune_noise_alpha`: with a key, noise on the embeddings.
        """
        positions, segment_ids = default_positions(tokens, positions, segment_ids)
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([tokens, positions, segment_ids])
        x, _ = self.model(tokens, positions, segment_ids, None, key, remat, neftune_noise_alpha)
        return x

    def set_attn_implementation(self, name: Implementation) -> None:
        """Set the attention kernel, see `phi3_jax.model.attention`; named as in transformers."""
        self.model.layers.self_attn.implementation = name

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits, float32 `[..., V]`, from hidden states `[..., D]`."""
        tied = (self.model.embed_tokens,) if self.config.tie_word_embeddings else ()
        scores: jax.Array = self.lm_head(hidden, *tied)
        return scores.astype(jnp.float32)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> jax.Array:
    return (std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


def _split(key: Key, count: int) -> Sequence[Key] | jax.Array:
    return [None] * count if key is None else jax.random.split(key, count)


def _stack(config: Phi3Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> Phi3DecoderLayer:
    """All decoder layers as one module, each array with a leading axis `[L, ...]`."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(layer_rngs: nnx.Rngs) -> Phi3DecoderLayer:
        return Phi3DecoderLayer(config, dtype, layer_rngs)

    layers = make(rngs.split(config.num_hidden_layers))
    layers.stack_size = config.num_hidden_layers
    return layers
