"""Learning-rate schedules: number for number those of transformers' `get_scheduler`.

A schedule is a warm-up from 0, then a decay of the peak rate. Names and settings
(`lr_scheduler_kwargs`) are those of transformers/optimization.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from phi3_jax.config.training import TrainingConfig
from phi3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Phases:
    """What a decay depends on besides the step and its settings.

    Attributes:
        warmup: steps of the warm-up.
        total: steps of the run.
        peak: the peak learning rate.
    """

    warmup: int
    total: int
    peak: float

    def progress(self, step: jax.Array) -> jax.Array:
        """The share of the steps after the warm-up that are done, in [0, 1]."""
        return jnp.clip((step - self.warmup) / max(1, self.total - self.warmup), 0.0, 1.0)


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Steps of the warm-up: `warmup_steps`, as a share of all if below 1, or `warmup_ratio`.

    A share is rounded up, as in HF's `TrainingArguments.get_warmup_steps`.
    """
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    return math.ceil((config.warmup_steps or config.warmup_ratio) * total_steps)


def learning_rate_schedule(config: TrainingConfig, total_steps: int) -> optax.Schedule:
    """The learning rate at step i, counted from 0; step 0 of a warm-up has rate 0.

    The steps of `extend` have a schedule of their own, as a run of that length. The warm-up of the
    optimizers `schedule_free_*` is one step ahead, as in the package schedulefree: their average
    has no weight for a step of rate 0.

    Raises:
        UserError: phases of `warmup_stable_decay` that do not fit the run's steps.
    """
    if not config.extend:
        return _schedule(config, total_steps)
    planned = total_steps - config.extend
    first, second = _schedule(config, planned), _schedule(config, config.extend)
    return lambda step: jnp.where(step < planned, first(step), second(step - planned))


def _schedule(config: TrainingConfig, total_steps: int) -> optax.Schedule:
    phases = Phases(warmup_steps(config, total_steps), total_steps, config.learning_rate)
    kind, settings = config.lr_scheduler_type, config.lr_scheduler_settings
    ahead = config.optim.startswith("schedule_free")
    if kind == "warmup_stable_decay":
        _check_stages(phases, **settings)

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + ahead) / max(1, phases.warmup), 1.0)
        if kind == "warmup_stable_decay":
            rise = _stage(rise, settings["warmup_type"], settings["min_lr_ratio"])
        fall = _DECAYS[kind](step, phases, **settings)
        return config.learning_rate * jnp.where(step < phases.warmup, rise, fall)

    return schedule


def _constant(step: jax.Array, phases: Phases) -> jax.Array:
    return jnp.ones_like(step)


def _linear(step: jax.Array, phases: Phases) -> jax.Array:
    return 1.0 - phases.progress(step)


def _cosine(
    step: jax.Array, phases: Phases, num_cycles: float, min_lr_rate: float = 0.0
) -> jax.Array:
    wave = 0.5 * (1.0 + jnp.cos(2.0 * jnp.pi * num_cycles * phases.progress(step)))
    return wave * (1.0 - min_lr_rate) + min_lr_rate


def _cosine_with_min_lr(
    step: jax.Array,
    phases: Phases,
    num_cycles: float,
    min_lr: float | None,
    min_lr_rate: float | None,
) -> jax.Array:
    if min_lr is not None:
        min_lr_rate = min_lr / phases.peak if phases.peak else 0.0
    return _cosine(step, phases, num_cycles, min_lr_rate or 0.0)


def _cosine_with_restarts(step: jax.Array, phases: Phases, num_cycles: float) -> jax.Array:
    progress = phases.progress(step)
    wave = 0.5 * (1.0 + jnp.cos(jnp.pi * ((num_cycles * progress) % 1.0)))
    return jnp.where(progress >= 1.0, 0.0, wave)


def _polynomial(step: jax.Array, phases: Phases, lr_end: float, power: float) -> jax.Array:
    end = lr_end / phases.peak if phases.peak else 0.0
    return (1.0 - end) * (1.0 - phases.progress(step)) ** power + end


def _inverse_sqrt(step: jax.Array, phases: Phases, timescale: float | None) -> jax.Array:
    scale = timescale or phases.warmup or 10_000
    shifted = jnp.maximum(step + scale - phases.warmup, 0.0)  # below 0 only during the warm-up
    return 1.0 / jnp.sqrt(shifted / scale)


def _warmup_stable_decay(
    step: jax.Array,
    phases: Phases,
    num_decay_steps: int,
    num_stable_steps: int | None,
    decay_type: str,
    min_lr_ratio: float,
    num_cycles: float,
    warmup_type: str,
) -> jax.Array:
    if num_stable_steps is None:
        num_stable_steps = phases.total - phases.warmup - num_decay_steps
    past = (step - phases.warmup - num_stable_steps) / max(1, num_decay_steps)
    fall = _stage(1.0 - jnp.clip(past, 0.0, 1.0), decay_type, min_lr_ratio, num_cycles)
    return jnp.where(past < 0.0, 1.0, jnp.where(past >= 1.0, min_lr_ratio, fall))


def _stage(
    height: jax.Array, shape: str, min_lr_ratio: float, num_cycles: float = 0.5
) -> jax.Array:
    """A rise from `min_lr_ratio` to 1 as `height` rises from 0 to 1, or the fall back."""
    factor = {
        "linear": height,
        "cosine": 0.5 * (1.0 + jnp.cos(2.0 * jnp.pi * num_cycles * (1.0 - height))),
        "1-sqrt": 1.0 - jnp.sqrt(1.0 - height),
    }[shape]
    return jnp.maximum(0.0, factor * (1.0 - min_lr_ratio) + min_lr_ratio)


def _check_stages(
    phases: Phases, num_decay_steps: int, num_stable_steps: int | None, **_: Any
) -> None:
    stages = phases.warmup + num_decay_steps + (num_stable_steps or 0)
    if stages > phases.total:
        raise UserError(
            f"training.lr_scheduler_kwargs: {phases.warmup} warm-up, {num_stable_steps or 0} "
            f"stable and {num_decay_steps} decay steps exceed the run's {phases.total} steps"
        )


_DECAYS: dict[str, Callable[..., jax.Array]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    "constant": _constant,
    "constant_with_warmup": _constant,
}
