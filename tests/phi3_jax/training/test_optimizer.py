"""The optimizer against torch's AdamW with clipping."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
import torch
import transformers

from phi3_jax.config.loader import TrainingConfig
from phi3_jax.training.optimizer import (
    clip_by_global_norm,
    make_optimizer,
    updates_made,
)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_equals_torch_adamw(max_grad_norm):
    config = TrainingConfig(
        output_dir="x", learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=3,
        weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    total = 20
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=5)}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    optimizer = torch.optim.AdamW(
        theirs.values(), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1
    )
    scheduler = transformers.get_scheduler("cosine", optimizer, 3, total)
    tx = make_optimizer(config, total)
    state = tx.init(params)
    for step in range(total):
        assert updates_made(state) == step
        # Gradients of norms on both sides of the clipping bound.
        grads = jax.tree.map(
            lambda x, scale=10.0 ** (step % 3 - 1): (
                rng.normal(size=x.shape).astype(np.float32) * scale
            ),
            params,
        )
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), max_grad_norm)
        optimizer.step()
        scheduler.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(params[name], parameter.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("norm", [0.0, 1e-6, 0.5, 1.0 - 1e-7, 3.0])
def test_clips_as_torch(norm):
    grads = {"a": np.array([0.6, 0.0], np.float32) * norm, "b": np.array([0.8], np.float32) * norm}
    theirs = [torch.nn.Parameter(torch.zeros(len(g))) for g in grads.values()]
    for parameter, grad in zip(theirs, grads.values(), strict=True):
        parameter.grad = torch.tensor(grad)
    torch.nn.utils.clip_grad_norm_(theirs, 1e-6 if norm == 1e-6 else 1.0)
    clip = clip_by_global_norm(1e-6 if norm == 1e-6 else 1.0)
    clipped, _ = clip.update(grads, clip.init(grads))
    for ours, parameter in zip(clipped.values(), theirs, strict=True):
        np.testing.assert_allclose(ours, parameter.grad, rtol=1e-6)
