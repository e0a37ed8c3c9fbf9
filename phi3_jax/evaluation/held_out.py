"""Held-out loss, perplexity and token accuracy.

Shared by training runs, sweeps, and `phi3-jax evaluate`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from phi3_jax.compiler import step_options
from phi3_jax.data.batches import Batch
from phi3_jax.evaluation.loss import LossSums, batch_loss

# exp overflows float64 beyond 709.8; the cap keeps the perplexity of a very bad model finite.
LARGEST_EXPONENT = 700.0


class HeldOutMetrics(NamedTuple):
    """Metrics over all held-out target tokens.

    Attributes:
        loss: mean of -log p(target), in nats.
        perplexity: exp of the loss.
        token_accuracy: share of targets for which no other token is more probable.
    """

    loss: float
    perplexity: float
    token_accuracy: float


def jit_eval_step(graphdef: nnx.GraphDef[Any]) -> Callable[..., LossSums]:
    """`step(trainable, frozen, batch) -> LossSums` for a batch `[B, S]`, without dropout."""
    step = functools.partial(batch_loss, graphdef, key=None, remat="none")
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    kind = jax.local_devices()[0].device_kind
    return jax.jit(step, compiler_options=step_options(jax.default_backend(), devices, kind))


def held_out_metrics(
    loss_sums: Callable[[Batch], LossSums], batches: Iterable[Batch]
) -> list[HeldOutMetrics]:
    """Evaluate one model, or N models at once, on held-out batches.

    Args:
        loss_sums: the loss sums of a batch, scalars for one model or `[N]` for N.
        batches: batches `[B, S]` that cover each held-out row once.

    Returns:
        The metrics of each model; a list of one for scalar sums. Sums over the batches are kept in
        float64.
    """
    total = np.zeros(())
    for batch in batches:
        total = total + np.asarray(jax.device_get(loss_sums(batch)), np.float64)  # [4] or [4, N]
    _, nll, correct, targets = total.reshape(4, -1).tolist()
    return [_metrics(*sums) for sums in zip(nll, correct, targets, strict=True)]


def _metrics(nll: float, correct: float, targets: float) -> HeldOutMetrics:
    loss = nll / targets
    return HeldOutMetrics(loss, math.exp(min(loss, LARGEST_EXPONENT)), correct / targets)
