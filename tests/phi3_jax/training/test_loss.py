"""The chunked loss against torch's cross-entropy, in value, gradient and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from phi3_jax.training.loss import next_token_loss

B, S, D, V = 3, 17, 16, 50


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.normal(size=(B, S, D)).astype(np.float32),
        "kernel": rng.normal(size=(D, V)).astype(np.float32),
        "tokens": rng.integers(0, V, (B, S), dtype=np.int32),
        "targets": rng.random((B, S)) < 0.4,
    }


@pytest.mark.parametrize("chunk", [1, 7, 48, 1000])
def test_equals_torch_in_value_and_gradient(case, chunk):
    def loss(hidden, kernel):
        sums = next_token_loss(lambda h: h @ kernel, hidden, case["tokens"], case["targets"], chunk)
        return sums.nll, sums

    grads, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(case["hidden"], case["kernel"])

    hidden = torch.tensor(case["hidden"], requires_grad=True)
    kernel = torch.tensor(case["kernel"], requires_grad=True)
    labels = torch.from_numpy(np.where(case["targets"], case["tokens"], -100)).long()
    logits = hidden @ kernel
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), reduction="sum"
    )
    expected.backward()
    np.testing.assert_allclose(sums.nll, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grads[0], hidden.grad, atol=1e-5)
    np.testing.assert_allclose(grads[1], kernel.grad, atol=1e-5)
    assert sums.targets == case["targets"][:, 1:].sum()
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum()
    assert sums.correct == int(hits)


def test_a_non_finite_logit_outside_the_targets_does_not_matter(case):
    case["targets"][:, 5] = False
    case["hidden"][:, 4] = np.inf
    sums = next_token_loss(
        lambda h: h @ case["kernel"], case["hidden"], case["tokens"], case["targets"]
    )
    assert jnp.isfinite(sums.nll)


def test_memory_does_not_hold_the_logits():
    vocabulary, width = 32_000, 64
    shapes = [
        jax.ShapeDtypeStruct((8, 1024, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((8, 1024), jnp.int32),
        jax.ShapeDtypeStruct((8, 1024), jnp.bool_),
    ]

    def loss(hidden, kernel, tokens, targets):
        return next_token_loss(lambda h: h @ kernel, hidden, tokens, targets).nll

    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
    logits_bytes = 8 * 1024 * vocabulary * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits_bytes / 3
