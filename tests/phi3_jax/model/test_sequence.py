"""Rows cut along their tokens over devices: what one device computes, to 1e-5."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax import UserError
from phi3_jax.config.data import DataConfig
from phi3_jax.config.sections import ModelConfig
from phi3_jax.evaluation.loss import LossSettings, batch_loss
from phi3_jax.model import sequence
from phi3_jax.model.attention import attention
from phi3_jax.model.blockwise import Tokens
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.sequence import zigzag
from phi3_jax.platform import attn_implementation
from phi3_jax.sharding.mesh import batch_sharding, make_mesh, place
from phi3_jax.sharding.rules import state_shardings
from phi3_jax.training.step import partition
from tests.conftest import LONGROPE
from tests.phi3_jax.model.test_attention import inputs, packed

pytestmark = pytest.mark.usefixtures("compiled_anew")


def test_every_device_has_the_same_work():
    order = zigzag(48, 4)
    assert sorted(order) == list(range(48))
    assert len({int(own.sum()) for own in order.reshape(4, -1)}) == 1


@pytest.mark.parametrize(
    ("kernel", "length", "mesh", "window"),
    [
        ("xla", 48, (1, 1, 1, 8), None),
        ("xla", 48, (2, 1, 1, 3), 11),  # the device in the middle exchanges with itself
        ("xla", 96, (1, 2, 2, 2), 30),
        ("splash_interpreted", 512, (1, 2, 2, 2), None),
        ("splash_interpreted", 512, (1, 1, 2, 2), 200),
        # Two devices share the heads, each with whole rows.
        ("xla", 96, (2, 1, 1, 2), 30),
        ("splash_interpreted", 512, (1, 2, 1, 2), None),
        ("splash_interpreted", 512, (1, 1, 1, 2), 200),
    ],
    ids=str,
)
def test_attention_is_that_of_one_device(kernel, length, mesh, window, monkeypatch):
    if length == 96:
        monkeypatch.setattr(sequence, "BLOCK", 8)  # several blocks of keys, not all of them seen
    query, key, value = inputs(2, length, 4, 2, 16)
    positions, segments = packed(2, length)
    tokens = Tokens(*map(jnp.asarray, (positions, segments, positions, segments)))
    real = (segments != 0)[..., None, None]
    d_out = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32) * real

    def run(kernel, *arrays):
        out, pull = jax.vjp(lambda *a: attention(*a, tokens, window, True, kernel), *arrays)
        return out * real, *pull(d_out)

    wanted = jax.jit(functools.partial(run, "xla"))(query, key, value)
    with jax.set_mesh(make_mesh(*mesh)):
        found = jax.jit(functools.partial(run, kernel))(query, key, value)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


# Larger weights amplify float32's rounding past 1e-5 on meshes that cut no row, too.
CONFIG = {
    "model_type": "phi3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "sliding_window": 20, "pad_token_id": 0,
    "initializer_range": 0.1,
} | LONGROPE  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2], ids=["keys gathered", "heads shared"])
def test_loss_and_gradients_are_those_of_one_device(kv_heads):
    """LongRoPE's long factors in one segment and short ones in others, window, dropout."""
    config = Phi3Config.from_hf(CONFIG | {"num_key_value_heads": kv_heads})
    model = phi3_jax.Phi3(config, rngs=nnx.Rngs(0))
    lora = lora_flax.LoraConfig(
        r=2,
        lora_alpha=2,
        lora_dropout=0.2,
        target_modules="all-linear",
        init_lora_weights=False,
    )
    lora_flax.wrap(model, lora, rngs=nnx.Rngs(1))
    graphdef, trainable, frozen = partition(model)
    positions, segments = packed(4, 96)
    positions[0], segments[0] = np.arange(96), 1  # beyond the 32 of the short factors
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(1, 64, (4, 96), dtype=np.int32),
        "positions": positions,
        "segment_ids": segments,
        "targets": (positions > 0) & (segments > 0) & (rng.random((4, 96)) < 0.7),
    }
    settings = LossSettings(label_smoothing=0.1, chunk=40)

    @jax.jit
    def run(trainable, frozen, batch):
        def loss(trainable):
            key = jax.random.key(3)
            sums = batch_loss(graphdef, trainable, frozen, batch, key, "full", settings)
            return sums.objective / sums.targets, sums

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return sums, grads

    wanted, wanted_grads = run(trainable, frozen, batch)
    on = make_mesh(2, 2, 1, 2)
    with jax.set_mesh(on):
        spread = (place(state, state_shardings(state, on)) for state in (trainable, frozen))
        found, grads = run(*spread, place(batch, batch_sharding(on)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert found.targets == batch["targets"].sum()
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_rows_that_cannot_be_cut_are_computed_whole():
    query, key, value = inputs(1, 9, 2, 1, 8)
    ids = jnp.ones((1, 9), jnp.int32)
    tokens = Tokens(*[jnp.arange(9)[None], ids] * 2)
    run = jax.jit(lambda *a: attention(*a, tokens, None, True))
    wanted = run(query, key, value)
    with jax.set_mesh(make_mesh(1, 1, 1, 4)):
        np.testing.assert_allclose(run(query, key, value), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("length", "kernel", "platform", "said"),
    [
        (100, "xla", "cpu", "4 devices take 2 pieces of each row each, but data.max_length 100 is"),
        (512, "splash", "tpu", "data.max_length 512 is not a multiple of 1024"),
        (1024, "cudnn", "gpu", "it needs whole rows, and mesh.sequence is 4"),
    ],
)
def test_refused(length, kernel, platform, said):
    data = DataConfig(path="unused", max_length=length, pad_to_multiple_of=length)
    section = ModelConfig(path="unused", dtype="bfloat16", attn_implementation=kernel)
    with pytest.raises(UserError, match=said):
        attn_implementation(section, data, 1, Phi3Config(), platform, sequence=4)


def test_chosen_where_it_fits():
    def chosen(length: int, platform: str) -> str:
        data = DataConfig(path="unused", max_length=length, pad_to_multiple_of=length)
        section = ModelConfig(path="unused", dtype="bfloat16")
        return attn_implementation(section, data, 1, Phi3Config(), platform, sequence=4)

    assert chosen(1024, "tpu") == "splash"
    assert chosen(512, "tpu") == chosen(1024, "gpu") == chosen(1024, "cpu") == "xla"
