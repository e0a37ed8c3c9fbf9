"""Held-out metrics: sums in float64 over all batches, for one model or several at once."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import phi3_jax
from phi3_jax.data.batches import eval_batches
from phi3_jax.data.masks import Example
from phi3_jax.evaluation.held_out import held_out_metrics, jit_eval_step
from phi3_jax.evaluation.loss import LossSums

BATCHES = [{"index": np.asarray(i)} for i in range(40)]


def sums_of(models: int = 0):
    """Random float32 sums of each batch, scalars or `[models]`, the first of them a large one."""
    shape = (len(BATCHES), 4, models) if models else (len(BATCHES), 4)
    values = np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)
    values[0] *= 1e6
    return values, lambda batch: LossSums(*map(jnp.asarray, values[batch["index"]]))


def test_equals_a_direct_sum_in_float64():
    values, loss_sums = sums_of()
    (found,) = held_out_metrics(loss_sums, BATCHES)
    nll, correct, targets = (math.fsum(map(float, values[:, i])) for i in (1, 2, 3))
    assert found.loss == pytest.approx(nll / targets, rel=1e-14)
    assert found.token_accuracy == pytest.approx(correct / targets, rel=1e-14)
    assert found.perplexity == pytest.approx(math.exp(nll / targets), rel=1e-14)
    in_float32 = np.cumsum(values, axis=0, dtype=np.float32)[-1]
    assert abs(in_float32[1] / in_float32[3] - found.loss) > 1e-10
    assert all(type(value) is float for value in found)


def test_several_models_at_once_are_each_alone():
    values, loss_sums = sums_of(models=3)
    found = held_out_metrics(loss_sums, BATCHES)
    for model, metrics in enumerate(found):
        own = values[..., model]
        assert [metrics] == held_out_metrics(lambda b, own=own: LossSums(*own[b["index"]]), BATCHES)


def test_perplexity_stays_finite_and_nan_stays_nan():
    (far_off,) = held_out_metrics(lambda _: LossSums(0.0, 2000.0, 0.0, 2.0), BATCHES[:1])
    assert far_off.loss == 1000.0 and math.isfinite(far_off.perplexity)
    (broken,) = held_out_metrics(lambda _: LossSums(0.0, math.nan, 0.0, 2.0), BATCHES[:1])
    assert math.isnan(broken.loss) and math.isnan(broken.perplexity)


def test_batch_size_does_not_matter():
    """Rows of unequal numbers of targets, the last batch filled up with empty rows."""
    config = phi3_jax.Phi3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    graphdef, state = nnx.split(phi3_jax.Phi3(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    examples = [
        Example(rng.integers(1, 97, length).astype(np.int32), np.arange(length) >= length // 2)
        for length in (3, 9, 5, 16, 12, 7, 4)
    ]
    step = jit_eval_step(graphdef)

    def measured(rows: int) -> list[float]:
        batches = eval_batches(examples, rows, 8, 16)
        (found,) = held_out_metrics(lambda batch: step(state, nnx.State({}), batch), batches)
        return list(found)

    np.testing.assert_allclose(measured(3), measured(1), rtol=1e-6)
