"""Heads cut, rotated, and joined by kernels as on TPUs, interpreted, against the plain forms."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax.model import heads
from phi3_jax.model.heads import join_heads, split_heads
from phi3_jax.model.rope import apply_rotary
from phi3_jax.sharding.mesh import batch_sharding, make_mesh, place
from phi3_jax.sharding.rules import state_shardings
from phi3_jax.training.step import partition
from tests.conftest import LONGROPE
from tests.phi3_jax.model.test_attention import packed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "k", "size", "rotary"), [(3, 3, 12, 12), (4, 2, 12, 8), (2, 1, 96, 96)], ids=str
)
def test_split_heads_is_the_plain_split_and_rotation(n, k, size, rotary, dtype, monkeypatch):
    """Value and gradient, several blocks of positions."""
    monkeypatch.setattr(heads, "MAX_POSITIONS", 8)
    keys = jax.random.split(jax.random.key(0), 5)
    qkv = jax.random.normal(keys[0], (2, 24, (n + 2 * k) * size)).astype(dtype)
    angles = 6 * jax.random.uniform(keys[1], (2, 24, rotary // 2))
    tables = 1.2 * jnp.cos(angles), 1.2 * jnp.sin(angles)
    scale = size**-0.5

    def plain(qkv):
        q, k_, v = jnp.split(qkv.reshape(2, 24, -1, size), [n, n + k], axis=2)
        rotated = apply_rotary(q, *tables) * scale, apply_rotary(k_, *tables), v
        return tuple(array.swapaxes(1, 2) for array in rotated)

    def ours(qkv):
        return split_heads(qkv, *tables, (n, k), scale, True)

    wanted, pull_wanted = jax.vjp(jax.jit(plain), qkv)
    found, pull_found = jax.vjp(jax.jit(ours), qkv)
    d_out = tuple(
        jax.random.normal(key, a.shape).astype(dtype)
        for key, a in zip(keys[2:], wanted, strict=True)
    )
    # XLA for CPUs contracts multiply-adds and keeps float32 between roundings as it likes.
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    for one, other in zip(
        (*found, *pull_found(d_out)), (*wanted, *pull_wanted(d_out)), strict=True
    ):
        assert one.shape == other.shape and one.dtype == other.dtype
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(found[2], wanted[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_join_heads_moves_values_alone(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, 24, 12)).astype(dtype)
    joined, pull = jax.vjp(lambda x: join_heads(x, True), x)
    np.testing.assert_array_equal(joined, x.swapaxes(1, 2).reshape(2, 24, 36))
    np.testing.assert_array_equal(pull(joined)[0], x)


CONFIG = phi3_jax.Phi3Config.from_hf(
    {
        "model_type": "phi3", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "pad_token_id": 0, "initializer_range": 0.1,
    }
)  # fmt: skip
LONG = phi3_jax.Phi3Config.from_hf(
    {
        "model_type": "phi3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "sliding_window": 150, "pad_token_id": 0, "initializer_range": 0.1,
    } | LONGROPE
)  # fmt: skip
PARTIAL = dataclasses.replace(CONFIG, partial_rotary_factor=0.75)
INT8 = lora_flax.BitsAndBytesConfig(load_in_8bit=True)
NF4 = lora_flax.BitsAndBytesConfig(load_in_4bit=True)
PLAIN = lora_flax.LoraConfig(r=2, target_modules="all-linear")


@pytest.mark.parametrize(
    ("config", "lora", "quantization", "mesh"),
    [
        (CONFIG, PLAIN, None, None),
        (LONG, dataclasses.replace(PLAIN, use_dora=True), INT8, None),
        (PARTIAL, dataclasses.replace(PLAIN, target_modules=["q_proj", "v_proj", "o_proj"]), NF4,
         None),
        (PARTIAL, PLAIN, None, (2, 2, 1, 2)),
        (CONFIG, PLAIN, None, (1, 2, 2, 1)),
    ],
    ids=["grouped", "longrope, window, DoRA, int8", "partial, slices, nf4", "sequence", "tensor"],
)  # fmt: skip
def test_the_network_computes_the_same(config, lora, quantization, mesh):
    """Logits and adapter gradients over packed rows, attention in plain JAX and by kernels."""
    rows, length = (2, 256) if mesh is None else (4, 512)
    positions, segments = packed(rows, length)
    tokens = np.random.default_rng(0).integers(1, 64, (rows, length), dtype=np.int32)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": segments}

    def outputs(implementation, mesh):
        model = phi3_jax.Phi3(config, rngs=nnx.Rngs(0))
        if quantization is not None:
            lora_flax.quantize(model, quantization)
        model.set_attn_implementation(implementation)
        lora_flax.wrap(model, lora, rngs=nnx.Rngs(1))
        graphdef, trainable, frozen = partition(model)
        trainable = jax.tree.map(lambda leaf: leaf + 0.05, trainable)

        @jax.jit
        def run(trainable, frozen, batch):
            def loss(trainable):
                logits = nnx.merge(graphdef, trainable, frozen)(**batch)
                logits = jnp.where(batch["segment_ids"][..., None] > 0, logits, 0)
                return jnp.mean(logits * jnp.sin(jnp.arange(64.0))), logits

            grads, logits = jax.grad(loss, has_aux=True)(trainable)
            return [logits, *jax.tree.leaves(grads)]

        if mesh is None:
            return run(trainable, frozen, batch)
        with jax.set_mesh(on := make_mesh(*mesh)):
            spread = (place(state, state_shardings(state, on)) for state in (trainable, frozen))
            return run(*spread, place(batch, batch_sharding(on)))

    found, wanted = outputs("splash_interpreted", mesh), outputs("xla", None)
    for ours, theirs in zip(found, wanted, strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
