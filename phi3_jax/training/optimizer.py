"""The optimizer with clipping and LoRA+, and the number of steps.

The optimizer covers only the trainable arrays, so the clipping norm is theirs alone and frozen
arrays take no optimizer state.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_flax
from phi3_jax.config.loader import TrainingConfig
from phi3_jax.config.run import MAX_STEPS
from phi3_jax.errors import UserError
from phi3_jax.training.optimizers import build_optimizer
from phi3_jax.training.schedules import learning_rate_schedule


def planned_steps(config: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps before `extend`: `max_steps`, or as many as `num_train_epochs` takes."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * steps_per_epoch)


def total_steps(config: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run, with `extend`.

    Raises:
        UserError: more than a step's number can say.
    """
    steps = planned_steps(config, steps_per_epoch) + (config.extend or 0)
    if steps > MAX_STEPS:
        raise UserError(
            f"training: {steps:,} steps are more than {MAX_STEPS:,}; lower num_train_epochs, "
            "max_steps or extend"
        )
    return steps


def make_optimizer(
    config: TrainingConfig, total_steps: int, model: nnx.Module | None = None
) -> optax.GradientTransformation:
    """Clipping, then the optimizer, as HF's `Trainer` does with torch's.

    Weight decay is decoupled where torch's is. As there, biases and norms do not decay, unless
    `weight_decay_on_all`.

    Args:
        config: the training section.
        total_steps: steps of the run, for the schedule.
        model: the wrapped model, whose trainable arrays the optimizer is for; only optimizers that
            look at whole matrices need it (`Optimizer.whole`, `lora_muon`).
    """
    steps = [build_optimizer(config, learning_rate_schedule(config, total_steps), model)]
    if config.max_grad_norm:
        steps.insert(0, clip_by_global_norm(config.max_grad_norm))
    tx = optax.chain(*steps)
    ratio = config.loraplus_lr_ratio
    return tx if ratio == 1 else lora_flax.loraplus(tx, ratio)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale by `min(1, max_norm / (norm + 1e-6))`, like torch's `clip_grad_norm_`.

    optax's version omits the 1e-6.
    """

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda grad: grad * scale, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def updates_made(opt_state: optax.OptState) -> int:
    """Number of steps taken and not skipped, which drives the schedule."""
    return int(update_counts(opt_state))


def update_counts(opt_state: optax.OptState) -> jax.Array:
    """`updates_made` as an array: a scalar, or `[N]` for the state of N members of a sweep."""
    counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    found: jax.Array = counts[-1][1]  # the schedule's; others may count for each layer
    return found
