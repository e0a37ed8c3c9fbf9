"""The optimizers `schedule_free_*`: a point for the gradients, and an average of the weights."""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from phi3_jax.config.training import TrainingConfig

Tree = TypeVar("Tree")


def schedule_free(
    config: TrainingConfig, rate: optax.Schedule, power: float, decay: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Defazio et al. 2024, arXiv:2405.15682, with the weight decay at the gradient's point.

    Args:
        config: the training section.
        rate: the learning rate at a step.
        power: the average weighs each step by its rate to this power.
        decay: adds the weight decay to an update.
    """
    if config.optimizer == "schedule_free_radam":
        rate = _rectified(rate, config.adam_beta2)
    steps = [decay, optax.scale_by_learning_rate(rate)]
    if config.optimizer != "schedule_free_sgd":
        scale = optax.scale_by_rms(
            config.adam_beta2, config.adam_epsilon, eps_in_sqrt=False, bias_correction=True
        )
        steps.insert(0, scale)
    return optax.contrib.schedule_free(
        optax.chain(*steps),
        lambda step: rate(step - 1),  # it counts from 1
        b1=_average_beta(config),
        weight_lr_power=power,
    )


def _rectified(rate: optax.Schedule, beta2: float) -> optax.Schedule:
    """RAdam's rate (Liu et al. 2019, arXiv:1908.03265), 0 while the variance has no estimate.

    The paper's rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t) subtracts two numbers of about
    2 / (1 - beta2), which leaves few digits in float32. With c = -log(beta2) it is

        rho_t = L(c / 2) + t (1 - L(t c / 2))        L(y) = coth(y) - 1 / y
    """
    rho_inf, c = 2.0 / (1.0 - beta2) - 1.0, -math.log(beta2)
    start = 1.0 / math.tanh(c / 2) - 2 / c

    def rectified(step: jax.Array | int) -> jax.Array:
        t = jnp.asarray(step, jnp.float32) + 1.0
        rho = start + t * _rest(t * c / 2)
        counts = jnp.where(rho > 4.0, rho, rho_inf)
        square = (counts - 4) * (counts - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * counts)
        return jnp.asarray(rate(step)) * jnp.where(rho > 4.0, jnp.sqrt(square), 0.0)

    return rectified


def _rest(y: jax.Array) -> jax.Array:
    """1 - L(y), without subtracting numbers of about the same size."""
    series = 1.0 - y / 3 + y**3 / 45 - 2 * y**5 / 945 + y**7 / 4725
    return jnp.where(y < 0.5, series, 1.0 / y - 2.0 / jnp.expm1(2.0 * y))


def averaged(config: TrainingConfig, opt_state: optax.OptState, trainable: Tree) -> Tree:
    """The weights to evaluate and export: the average that `schedule_free_*` keeps, or the weights.

    Args:
        config: the training section.
        opt_state: the optimizer's state, also of N members of a sweep.
        trainable: the arrays that the gradients are taken at.
    """
    if not config.optim.startswith("schedule_free"):
        return trainable
    z, b1 = optax.tree_utils.tree_get(opt_state, "z"), _average_beta(config)
    found: Tree = jax.tree.map(
        lambda y, zi: (jnp.asarray(y) - (1.0 - b1) * jnp.asarray(zi)) / b1, trainable, z
    )
    return found


def _average_beta(config: TrainingConfig) -> float:
    # schedulefree's SGD has its own beta, which transformers leaves at 0.9.
    return 0.9 if config.optimizer == "schedule_free_sgd" else config.adam_beta1
