"""The optimizers of `training.optim`: optax's, put together as torch and transformers compute them.

Each one here is everything but clipping and LoRA+ (see `phi3_jax/training/optimizer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_flax
from phi3_jax.config.training import TrainingConfig
from phi3_jax.training.schedule_free import schedule_free


def build_optimizer(
    config: TrainingConfig, rate: optax.Schedule, model: nnx.Module | None
) -> optax.GradientTransformation:
    """The optimizer that the config names.

    Args:
        config: the training section.
        rate: the learning rate at a step.
        model: the wrapped model; only those that look at whole matrices need one.
    """
    settings = config.optimizer_settings
    if config.optimizer in _ELEMENTWISE:
        return _ELEMENTWISE[config.optimizer](config, rate, settings)
    assert model is not None, f"{config.optim} needs the model"
    return _WHOLE[config.optimizer](config, rate, settings, model)


def _decays(config: TrainingConfig) -> Callable[[Any], Any] | None:
    """The arrays that decay: as in HF's `Trainer`, no biases and norms, or all of them."""
    return None if config.weight_decay_on_all else lora_flax.decay_mask


def _decayed(config: TrainingConfig) -> optax.GradientTransformation:
    return optax.add_decayed_weights(config.weight_decay, _decays(config))


def _adamw(config: TrainingConfig, rate: optax.Schedule, _: Any) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=_decays(config),
    )


def _lion(config: TrainingConfig, rate: optax.Schedule, _: Any) -> optax.GradientTransformation:
    betas = {"b1": config.adam_beta1, "b2": config.adam_beta2}
    return optax.lion(rate, **betas, weight_decay=config.weight_decay, mask=_decays(config))


def _ademamix(
    config: TrainingConfig, rate: optax.Schedule, settings: Any
) -> optax.GradientTransformation:
    beta1, beta3, alpha = config.adam_beta1, settings.beta3, settings.alpha
    t_alpha, t_beta3 = settings.t_alpha, settings.t_beta3

    def alpha_at(step: jax.Array) -> jax.Array:
        return jnp.asarray(alpha * jnp.minimum((step + 1) / t_alpha, 1.0))

    def beta3_at(step: jax.Array) -> jax.Array:
        """From beta1 to beta3 so that the time to forget half of a gradient grows linearly."""
        low, high, done = math.log(beta1), math.log(beta3), (step + 1) / t_beta3
        return jnp.minimum(jnp.exp(low * high / ((1 - done) * high + done * low)), beta3)

    return optax.contrib.ademamix(
        rate,
        b1=beta1,
        b2=config.adam_beta2,
        b3=beta3 if t_beta3 is None else beta3_at,
        alpha=alpha if t_alpha is None else alpha_at,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=_decays(config),
    )


def _sgd(
    config: TrainingConfig, rate: optax.Schedule, settings: Any
) -> optax.GradientTransformation:
    steps = [_decayed(config)]
    if settings.momentum:
        steps.append(optax.trace(settings.momentum, settings.nesterov))
    return optax.chain(*steps, optax.scale_by_learning_rate(rate))


def _adagrad(
    config: TrainingConfig, rate: optax.Schedule, settings: Any
) -> optax.GradientTransformation:
    # torch adds eps to the root, optax its square to what is under it: equal but near zero.
    return optax.chain(
        _decayed(config),
        optax.scale_by_rss(initial_accumulator_value=0.0, eps=settings.eps**2),
        optax.scale_by_learning_rate(rate),
    )


def _rmsprop(
    config: TrainingConfig, rate: optax.Schedule, settings: Any
) -> optax.GradientTransformation:
    scale = optax.scale_by_stddev if settings.centered else optax.scale_by_rms
    steps = [_decayed(config), scale(settings.alpha, settings.eps, eps_in_sqrt=False)]
    if settings.momentum:
        steps.append(optax.trace(settings.momentum))
    return optax.chain(*steps, optax.scale_by_learning_rate(rate))


def _schedule_free(
    config: TrainingConfig, rate: optax.Schedule, settings: Any
) -> optax.GradientTransformation:
    return schedule_free(config, rate, settings.weight_lr_power, _decayed(config))


def _prodigy(
    config: TrainingConfig, rate: optax.Schedule, settings: Any
) -> optax.GradientTransformation:
    """Mishchenko et al. 2023, arXiv:2306.06101, with a mask for the weight decay.

    As in the package prodigyopt, and unlike optax alone, a step of rate 0 or without gradients
    changes nothing: the estimate would be 0 / 0.
    """
    beta1, beta2 = config.adam_beta1, config.adam_beta2
    decay = _decayed(config)

    def at(factor: jax.Array | float) -> optax.GradientTransformation:
        return optax.contrib.prodigy(
            factor,
            (beta1, beta2),
            settings.beta3,
            config.adam_epsilon,
            settings.d0,
            settings.d_coef,
            safeguard_warmup=settings.safeguard_warmup,
        )

    def init(params: optax.Params) -> Any:
        return at(1.0).init(params), decay.init(params), {"count": jnp.zeros((), jnp.int32)}

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        before, decay_state, taken = state
        factor = jnp.asarray(rate(taken["count"]))
        steps, after = at(factor).update(updates, before, params)
        correction = jnp.sqrt(1 - beta2**after.count) / (1 - beta1**after.count)
        zeros = jax.tree.map(jnp.zeros_like, steps)
        decayed, decay_state = decay.update(zeros, decay_state, params)
        found = before.estim_lr * factor * correction
        moves = (factor > 0) & jnp.isfinite(after.estim_lr)
        steps = jax.tree.map(lambda s, d: jnp.where(moves, s - found * d, 0.0), steps, decayed)
        after = jax.tree.map(lambda new, old: jnp.where(moves, new, old), after, before)
        return steps, (after, decay_state, {"count": taken["count"] + 1})

    return optax.GradientTransformation(init, update)


def _stable_adamw(
    config: TrainingConfig, rate: optax.Schedule, settings: Any, model: nnx.Module
) -> optax.GradientTransformation:
    """AdamW with Adafactor's clipping of the rate (Wortsman et al. 2023, arXiv:2304.13013).

    As in the package torch-optimi, a parameter's rate, which also scales its weight decay, is
    divided by the root mean square of its gradient over its second moment, where that is above 1.
    """
    eps, decay = config.adam_epsilon, _decayed(config)
    adam = optax.scale_by_adam(config.adam_beta1, config.adam_beta2, eps)
    clip = lora_flax.per_part(_divide_by_rms(), lora_flax.array_parts(model))

    def init(params: optax.Params) -> Any:
        return adam.init(params), decay.init(params), clip.init(params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        steps, after = adam.update(updates, state[0])
        moment = optax.tree_utils.tree_bias_correction(after.nu, config.adam_beta2, after.count)
        ratios = jax.tree.map(lambda g, v: g**2 / jnp.maximum(v, eps**2), updates, moment)
        steps, decay_state = decay.update(steps, state[1], params)
        steps, clip_state = clip.update(steps, state[2], ratios)
        return steps, (after, decay_state, clip_state)

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(rate)
    )


def _divide_by_rms() -> optax.GradientTransformationExtraArgs:
    """By the root of the mean of the squares that come in place of the parameters, if above 1."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: Any = None, *, size: jax.Array
    ) -> tuple[optax.Updates, optax.OptState]:
        rms = jnp.sqrt(params.sum() / jnp.maximum(size.prod(), 1.0))
        return jax.tree.map(lambda u: u / jnp.maximum(1.0, rms), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _adafactor(
    config: TrainingConfig, rate: optax.Schedule, settings: Any, model: nnx.Module
) -> optax.GradientTransformation:
    """transformers' `Adafactor(scale_parameter=False, relative_step=False)`."""
    scale = optax.scale_by_factored_rms(decay_rate=-settings.decay_rate, min_dim_size_to_factor=1)
    one = optax.chain(scale, _clip_by_rms(settings.clip_threshold))
    return optax.chain(
        lora_flax.per_part(one, lora_flax.array_parts(model)),
        _decayed(config),
        optax.scale_by_learning_rate(rate),
    )


def _clip_by_rms(threshold: float) -> optax.GradientTransformationExtraArgs:
    def update(
        updates: optax.Updates, state: optax.OptState, params: Any = None, *, size: jax.Array
    ) -> tuple[optax.Updates, optax.OptState]:
        norm = optax.tree.norm(updates) / jnp.sqrt(jnp.maximum(size.prod(), 1.0))
        return jax.tree.map(lambda u: u / jnp.maximum(1.0, norm / threshold), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _muon(
    config: TrainingConfig, rate: optax.Schedule, settings: Any, model: nnx.Module
) -> optax.GradientTransformation:
    """Muon for A and B, one by one, and AdamW for everything else."""
    muon = optax.contrib.scale_by_muon(
        ns_steps=settings.ns_steps, beta=settings.momentum, nesterov=settings.nesterov
    )
    one = optax.chain(muon, _scale_by_shape())
    tx = optax.chain(
        lora_flax.per_part(one, lora_flax.array_parts(model)),
        _decayed(config),
        optax.scale_by_learning_rate(rate),
    )
    return _for_pairs(tx, _adamw(config, rate, None))


def _scale_by_shape() -> optax.GradientTransformationExtraArgs:
    """By `sqrt(max(1, out / in))`, as optax's and torch's Muon do by default."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: Any = None, *, size: jax.Array
    ) -> tuple[optax.Updates, optax.OptState]:
        factor = jnp.sqrt(jnp.maximum(1.0, size[1] / jnp.maximum(size[0], 1.0)))
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _lora_muon(
    config: TrainingConfig, rate: optax.Schedule, settings: Any, model: nnx.Module
) -> optax.GradientTransformation:
    """LoRA-Muon for A and B, and AdamW for everything else."""
    parts = lora_flax.array_parts(model)
    tx = lora_flax.lora_muon(rate, parts, settings.momentum, config.weight_decay)
    return _for_pairs(tx, _adamw(config, rate, None))


def _for_pairs(
    pairs: optax.GradientTransformation, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    def labels(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "pairs" if lora_flax.is_factor(path) else "others", tree
        )

    return optax.partition({"others": others, "pairs": pairs}, labels)


_ELEMENTWISE: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "ademamix": _ademamix,
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "schedule_free_adamw": _schedule_free,
    "schedule_free_sgd": _schedule_free,
    "schedule_free_radam": _schedule_free,
    "prodigy": _prodigy,
}
_WHOLE: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adafactor": _adafactor,
    "stable_adamw": _stable_adamw,
    "muon": _muon,
    "lora_muon": _lora_muon,
}
