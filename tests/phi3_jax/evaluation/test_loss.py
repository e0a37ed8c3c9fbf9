"""The chunked loss against torch's cross-entropy, in value, gradient and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from phi3_jax.evaluation.loss import LossSettings, chunk_count, chunk_width, next_token_loss

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


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 15, 48, 1000, None])
def test_equals_torch_in_value_and_gradient(case, chunk, jit):
    def loss(hidden, kernel):
        sums = next_token_loss(
            lambda h: h @ kernel,
            hidden,
            case["tokens"],
            case["targets"],
            LossSettings(chunk=chunk),
        )
        return sums.objective, sums

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    grads, sums = (jax.jit(grad) if jit else grad)(case["hidden"], case["kernel"])
    assert sums.objective == sums.nll

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


@pytest.mark.parametrize("chunk", [7, None])
def test_dft_is_trls(case, chunk):
    """TRL's `loss_type="dft"`: each loss times its probability, taken as a constant."""

    def loss(hidden, kernel):
        sums = next_token_loss(
            lambda h: h @ kernel,
            hidden,
            case["tokens"],
            case["targets"],
            LossSettings(chunk=chunk, loss_type="dft"),
        )
        return sums.objective, sums

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    grads, sums = jax.jit(grad)(case["hidden"], case["kernel"])
    hidden = torch.tensor(case["hidden"], requires_grad=True)
    kernel = torch.tensor(case["kernel"], requires_grad=True)
    labels = torch.from_numpy(np.where(case["targets"], case["tokens"], -100)).long()[:, 1:]
    log_probs = (hidden @ kernel)[:, :-1].log_softmax(-1)
    own = torch.gather(log_probs, -1, labels.clamp(min=0)[..., None])[..., 0]
    own = torch.where(labels >= 0, own, 0.0)
    per_token_loss = -own * own.exp().detach()
    per_token_loss.sum().backward()
    np.testing.assert_allclose(sums.objective, per_token_loss.sum().item(), rtol=1e-6)
    np.testing.assert_allclose(sums.nll, -own.sum().item(), rtol=1e-6)
    np.testing.assert_allclose(grads[0], hidden.grad, atol=1e-5)
    np.testing.assert_allclose(grads[1], kernel.grad, atol=1e-5)


def test_a_non_finite_logit_outside_the_targets_does_not_matter(case):
    case["targets"][:, 5] = False
    case["hidden"][:, 4] = np.inf
    sums = next_token_loss(
        lambda h: h @ case["kernel"], case["hidden"], case["tokens"], case["targets"]
    )
    assert jnp.isfinite(sums.nll)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
def test_label_smoothing_and_z_loss(case, smoothing, z_loss):
    settings = LossSettings(label_smoothing=smoothing, z_loss=z_loss, chunk=9)

    def loss(hidden, kernel):
        sums = next_token_loss(
            lambda h: h @ kernel, hidden, case["tokens"], case["targets"], settings
        )
        return 3.0 * sums.objective, sums

    grads, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(case["hidden"], case["kernel"])
    hidden = torch.tensor(case["hidden"], requires_grad=True)
    kernel = torch.tensor(case["kernel"], requires_grad=True)
    labels = torch.from_numpy(np.where(case["targets"], case["tokens"], -100)).long()
    logits = (hidden @ kernel)[:, :-1].reshape(-1, V)
    flat = labels[:, 1:].reshape(-1)
    smoothed = torch.nn.functional.cross_entropy(
        logits, flat, reduction="sum", label_smoothing=smoothing
    )
    expected = smoothed + z_loss * (torch.logsumexp(logits, -1)[flat >= 0] ** 2).sum()
    (3.0 * expected).backward()
    np.testing.assert_allclose(sums.objective, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grads[0], hidden.grad, atol=5e-5)
    np.testing.assert_allclose(grads[1], kernel.grad, atol=5e-5)
    plain = torch.nn.functional.cross_entropy(logits, flat, reduction="sum")
    np.testing.assert_allclose(sums.nll, plain.item(), rtol=1e-6)


def test_a_frozen_head_has_no_gradient(case):
    """One matmul gives the logits, one the gradient of the hidden states; none that of the head."""

    def loss(hidden, kernel):
        sums = next_token_loss(lambda h: h @ kernel, hidden, case["tokens"], case["targets"])
        return sums.objective

    text = str(jax.make_jaxpr(jax.jit(jax.grad(loss)))(case["hidden"], case["kernel"]))
    assert text.count("dot_general") == 2
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(case["hidden"], case["kernel"]))
    assert text.count("dot_general") == 3


def test_chunks_are_equal():
    """A chunk of 170 positions per row would leave 1 of 511 to a fourth, which costs as much."""
    settings = LossSettings(chunk=4 * 170)
    assert chunk_width(4, 511, 100, settings) == 128
    assert chunk_count(4, 512, 100, settings) == 4


def test_no_targets_at_all(case):
    case["targets"][:] = False

    def loss(hidden):
        sums = next_token_loss(
            lambda h: h @ case["kernel"], hidden, case["tokens"], case["targets"]
        )
        return sums.objective

    value, grad = jax.value_and_grad(loss)(case["hidden"])
    assert value == 0 and not np.asarray(grad).any()


def temporaries(rows: int, length: int, width: int, vocabulary: int, dtype) -> int:
    """Bytes of temporary buffers of the compiled gradient of the hidden states."""
    shapes = [
        jax.ShapeDtypeStruct((rows, length, width), dtype),
        # XLA's CPU backend multiplies no bfloat16: it would make a float32 copy of the head.
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, length), jnp.bool_),
    ]

    def loss(hidden, kernel, tokens, targets):
        return next_token_loss(lambda h: h @ kernel, hidden, tokens, targets).objective

    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_at_the_largest_vocabulary():
    """Phi-4-mini's 200,064 tokens, 8 x 4,096 positions: under 1 GiB, where logits are 26 GiB."""
    assert temporaries(8, 4096, 3072, 200_064, jnp.bfloat16) < 2**30


def test_memory_does_not_hold_the_logits():
    logits_bytes = 8 * 1024 * 32_000 * 4
    assert temporaries(8, 1024, 64, 32_000, jnp.float32) < logits_bytes / 3


def test_a_cpu_computes_the_logits_as_columns(case):
    """Rows as long as a vocabulary make both products with the head slow."""

    def gradient(hidden, embedding):
        def loss(own):
            return next_token_loss(
                lambda h: h @ embedding.T, own, case["tokens"], case["targets"]
            ).objective

        return jax.grad(loss)(hidden)

    compiled = jax.jit(gradient).lower(case["hidden"], case["kernel"].T).compile()
    rows = B * (S - 1)
    assert f"f32[{V},{rows}]" in compiled.as_text()
    assert f"f32[{rows},{V}]" not in compiled.as_text()
