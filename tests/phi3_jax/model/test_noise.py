"""NEFTune against the hook of transformers, with the same noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers.integrations.neftune import neftune_post_forward_hook

import lora_flax
import phi3_jax
from phi3_jax.evaluation.loss import LossSettings
from phi3_jax.model.noise import neftune
from phi3_jax.training.step import TrainState, partition, train_step
from tests.conftest import tiny_hf_model

ALPHA, KEY = 5.0, jax.random.key(3)
TOKENS = np.random.default_rng(0).integers(3, 128, (2, 9), dtype=np.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi3")
    theirs = tiny_hf_model(num_hidden_layers=1)
    theirs.save_pretrained(folder)
    return phi3_jax.load(folder), theirs


def test_equals_transformers(models, monkeypatch):
    ours, theirs = models
    seen = []

    def uniform_(tensor, low, high):
        seen.append((float(low), float(high)))
        noise = neftune(jnp.zeros(tensor.shape), ALPHA, KEY)
        return tensor.copy_(torch.tensor(np.array(noise)))

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    embedding = theirs.model.embed_tokens
    embedding.neftune_noise_alpha = ALPHA
    handle = embedding.register_forward_hook(neftune_post_forward_hook)
    with torch.no_grad():
        expected = theirs.train()(torch.from_numpy(TOKENS).long()).logits.numpy()
        still = theirs.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()
    handle.remove()
    bound = ALPHA / np.sqrt(9 * 64)
    assert seen == [(pytest.approx(-bound), pytest.approx(bound))]
    run = jax.jit(
        lambda key, alpha: ours.head(
            ours.hidden_states(TOKENS, key=key, neftune_noise_alpha=alpha)
        ),
        static_argnums=1,
    )
    np.testing.assert_allclose(run(KEY, ALPHA), expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(run(KEY, 0.0), still, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(run(None, ALPHA), run(None, 0.0))
    assert np.abs(expected - still).max() > 0.1


def test_noise_fills_its_range():
    noise = np.asarray(neftune(jnp.zeros((4, 25, 16)), 2.0, KEY)) * np.sqrt(25 * 16) / 2.0
    assert -1 <= noise.min() < -0.99 and 0.99 < noise.max() <= 1
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1 / np.sqrt(3), rel=0.05)
    assert neftune(jnp.zeros((1, 2, 3), jnp.bfloat16), 2.0, KEY).dtype == jnp.bfloat16


def test_a_step_has_noise_of_its_seed_step_and_micro_batch(models):
    model, _ = models
    model = nnx.clone(model)
    lora_flax.wrap(model, lora_flax.LoraConfig(r=2, target_modules=["o_proj"]), rngs=nnx.Rngs(0))
    graphdef, trainable, frozen = partition(model)
    tx = optax.sgd(1.0)
    row = {"tokens": TOKENS, "positions": np.tile(np.arange(9, dtype=np.int32), (2, 1))}
    row |= {"segment_ids": np.ones((2, 9), np.int32), "targets": np.ones((2, 9), bool)}
    once, twice = ({name: np.stack([a] * n) for name, a in row.items()} for n in (1, 2))

    @jax.jit
    def loss(batch, step, seed):
        state = TrainState(trainable, tx.init(trainable))
        settings = LossSettings(neftune_noise_alpha=ALPHA)
        _, metrics = train_step(
            graphdef, tx, "none", state, frozen, batch, step, seed, loss=settings
        )
        return metrics.loss

    first = loss(once, 0, 1)
    assert loss(once, 0, 1) == first
    others = [loss(once, 1, 1), loss(once, 0, 2), loss(twice, 0, 1)]
    assert len({float(first), *map(float, others)}) == 4
