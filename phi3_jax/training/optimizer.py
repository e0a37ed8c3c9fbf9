"""AdamW, clipping and schedules that match torch and HF Trainer.

The optimizer covers only the trainable arrays, so the clipping norm is theirs alone and frozen
arrays take no optimizer state.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

import lora_flax
from phi3_jax.config.loader import TrainingConfig


def planned_steps(config: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps before `extend`: `max_steps`, or as many as `num_train_epochs` takes."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * steps_per_epoch)


def total_steps(config: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run, with `extend`."""
    return planned_steps(config, steps_per_epoch) + (config.extend or 0)


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Warm-up steps: `warmup_steps`, or the `warmup_ratio` share, rounded up as HF does."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)


def learning_rate_schedule(config: TrainingConfig, total_steps: int) -> optax.Schedule:
    """The learning rate at step i, counted from 0, matching HF's `get_scheduler`.

    Linear warm-up from 0 (step 0 of a warm-up has rate 0), then constant, linear decay or a half
    cosine to 0 at `total_steps`. `constant` is HF's `constant_with_warmup`; HF's own `constant`
    ignores warm-up. The steps of `extend` have a schedule of their own, as a run of that length.
    """
    if not config.extend:
        return _schedule(config, total_steps)
    planned = total_steps - config.extend
    first, second = _schedule(config, planned), _schedule(config, config.extend)
    return lambda step: jnp.where(step < planned, first(step), second(step - planned))


def _schedule(config: TrainingConfig, total_steps: int) -> optax.Schedule:
    warmup = warmup_steps(config, total_steps)
    kind = config.lr_scheduler_type

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = step / max(1, warmup)
        progress = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        fall = {
            "constant": jnp.ones_like(progress),
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
        }[kind]
        return config.learning_rate * jnp.where(step < warmup, rise, fall)

    return schedule


def make_optimizer(config: TrainingConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW with decoupled weight decay, like torch's `AdamW` in HF's `Trainer`.

    Like there, biases and norms do not decay, unless `weight_decay_on_all`.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=None if config.weight_decay_on_all else lora_flax.decay_mask,
    )
    steps = [adamw]
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
    found: jax.Array = counts[0][1]  # Adam's count and the schedule's are equal
    return found
