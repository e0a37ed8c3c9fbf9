"""Every optimizer against torch, transformers, bitsandbytes, or optax on each layer's arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimi
import pytest
import schedulefree
import torch
import transformers
from bitsandbytes.optim.ademamix import _ReferenceAdEMAMix
from prodigyopt import Prodigy

from phi3_jax.config.loader import TrainingConfig
from phi3_jax.config.optimizers import NAMES
from phi3_jax.sharding.mesh import make_mesh, place
from phi3_jax.training.optimizer import make_optimizer, updates_made
from phi3_jax.training.schedule_free import _rectified, averaged
from phi3_jax.training.schedules import learning_rate_schedule
from phi3_jax.training.step import start_state, train_state_shardings
from tests.lora_flax.optimizers.separate import one_by_one, random_like, wrapped_stack

STEPS, RATE, DECAY = 4, 1e-2, 0.1


def training(**fields) -> TrainingConfig:
    defaults = {"output_dir": "x", "learning_rate": RATE, "max_grad_norm": 0.0}
    return TrainingConfig(**defaults | {"weight_decay": DECAY, "adam_beta2": 0.95} | fields)


def gradients(trainable, step):
    return jax.tree.map(lambda g: g * 10.0 ** (step % 3 - 1), random_like(trainable, step))


def ours(config, evaluated=False, steps=STEPS):
    """The arrays after each step, one by one."""
    model, trainable = wrapped_stack()
    tx = make_optimizer(config, steps, model)
    state, after = tx.init(trainable), []
    update = jax.jit(tx.update)
    for step in range(steps):
        assert updates_made(state) == step
        updates, state = update(gradients(trainable, step), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        after.append(one_by_one(averaged(config, state, trainable) if evaluated else trainable))
    return after


SCHEDULE_FREE = (
    schedulefree.AdamWScheduleFree, schedulefree.SGDScheduleFree, schedulefree.RAdamScheduleFree
)  # fmt: skip


def torchs(make, config, evaluated=False, steps=STEPS):
    """The same of a torch optimizer, with the learning rates of the config's schedule."""
    _, trainable = wrapped_stack()
    separate = one_by_one(trainable)
    weights = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in separate.items()}
    optimizer = make(list(weights.values()))
    schedule = learning_rate_schedule(config, steps)
    after = []
    for step in range(steps):
        if isinstance(optimizer, SCHEDULE_FREE):
            optimizer.train()
        else:
            for group in optimizer.param_groups:
                group["lr"] = float(schedule(step))
        for name, grad in one_by_one(gradients(trainable, step)).items():
            weights[name].grad = torch.tensor(grad)
        optimizer.step()
        if evaluated:
            optimizer.eval()
        after.append({name: weight.detach().numpy().copy() for name, weight in weights.items()})
    return after


def optaxs(make, config):
    """The same of an optax optimizer for the tree of separate arrays."""
    _, like = wrapped_stack()
    weights = {name: jnp.asarray(array) for name, array in one_by_one(like).items()}
    tx = make(learning_rate_schedule(config, STEPS))
    state, after = tx.init(weights), []
    for step in range(STEPS):
        updates, state = tx.update(one_by_one(gradients(like, step)), state, weights)
        weights = optax.apply_updates(weights, updates)
        after.append(weights)
    return after


def label(value) -> str:
    """A parameter's text, without functions: theirs has an address, which differs by process."""
    return "" if callable(value) else str(value)[:40]


def assert_same(found, expected, tolerance=2e-5):
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, array in theirs.items():
            assert np.isfinite(array).all()
            np.testing.assert_allclose(
                mine[name], array, rtol=tolerance, atol=tolerance, err_msg=f"{step} {name}"
            )


BETAS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": DECAY}
TORCH = [
    ("adamw_torch", {}, lambda p: torch.optim.AdamW(p, RATE, **BETAS)),
    (
        "adafactor",
        {},
        lambda p: transformers.Adafactor(
            p, RATE, scale_parameter=False, relative_step=False, weight_decay=DECAY
        ),
    ),
    (
        "adafactor",
        {"clip_threshold": 0.5, "decay_rate": -0.6},
        lambda p: transformers.Adafactor(
            p, RATE, scale_parameter=False, relative_step=False, weight_decay=DECAY,
            clip_threshold=0.5, decay_rate=-0.6,
        ),
    ),
    ("sgd", {}, lambda p: torch.optim.SGD(p, RATE, weight_decay=DECAY)),
    (
        "sgd",
        "momentum=0.9, nesterov=True",
        lambda p: torch.optim.SGD(p, RATE, 0.9, weight_decay=DECAY, nesterov=True),
    ),
    ("adagrad", {}, lambda p: torch.optim.Adagrad(p, RATE, weight_decay=DECAY)),
    ("rmsprop", {}, lambda p: torch.optim.RMSprop(p, RATE, weight_decay=DECAY)),
    (
        "rmsprop_bnb",
        "alpha=0.9,momentum=0.8,centered=true,eps=1e-6",
        lambda p: torch.optim.RMSprop(p, RATE, 0.9, 1e-6, DECAY, 0.8, centered=True),
    ),
    (
        "paged_ademamix_8bit",
        "alpha=3,beta3=0.99",
        lambda p: _ReferenceAdEMAMix(p, RATE, (0.9, 0.95, 0.99), 3.0, weight_decay=DECAY),
    ),
    (
        "ademamix",
        {"t_alpha": 4, "t_beta3": 3, "beta3": 0.99},
        # Within a group, it warms up anew for each parameter.
        lambda p: _ReferenceAdEMAMix(
            [{"params": [one]} for one in p], RATE, (0.9, 0.95, 0.99), weight_decay=DECAY,
            t_alpha=4, t_beta3=3,
        ),
    ),
    ("stable_adamw", {}, lambda p: optimi.StableAdamW(p, RATE, **BETAS, triton=False)),
    (
        "prodigy",
        {},
        lambda p: Prodigy(p, RATE, (0.9, 0.95), weight_decay=DECAY, use_bias_correction=True),
    ),
    (
        "prodigy",
        "d0=1e-3,d_coef=2.0,beta3=0.9,safeguard_warmup=true",
        lambda p: Prodigy(
            p, RATE, (0.9, 0.95), 0.9, weight_decay=DECAY, use_bias_correction=True, d0=1e-3,
            d_coef=2.0, safeguard_warmup=True,
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "make"), TORCH, ids=label)
def test_equals_torch_on_each_layers_arrays(name, args, make):
    # The first step has a rate of 0.
    config = training(optim=name, optim_args=args, lr_scheduler_type="cosine", warmup_steps=1)
    assert_same(ours(config), torchs(make, config))


OPTAX = [
    ("lion_32bit", {}, lambda rate: optax.lion(rate, 0.9, 0.95, weight_decay=DECAY)),
    (
        "muon",
        {},
        lambda rate: optax.contrib.muon(rate, weight_decay=DECAY),
    ),
    (
        "muon",
        "momentum=0.8,nesterov=false,ns_steps=6",
        lambda rate: optax.contrib.muon(
            rate, beta=0.8, nesterov=False, ns_steps=6, weight_decay=DECAY
        ),
    ),
    (
        "adafactor",
        {},
        lambda rate: optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=1),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(DECAY),
            optax.scale_by_learning_rate(rate),
        ),
    ),
]


@pytest.mark.parametrize(("name", "args", "make"), OPTAX, ids=label)
def test_equals_optax_on_each_layers_arrays(name, args, make):
    config = training(optim=name, optim_args=args, lr_scheduler_type="cosine", warmup_steps=2)
    assert_same(ours(config), optaxs(make, config))


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
def test_schedule_free_equals_its_package(warmup, evaluated):
    """The point where gradients are taken, and the average, which is evaluated and exported."""
    shared = {"lr_scheduler_type": "constant", "warmup_steps": warmup}
    config = training(optim="schedule_free_adamw", adam_beta1=0.8, **shared)
    settings = {"weight_decay": DECAY, "warmup_steps": warmup}

    def adamw(p):
        return schedulefree.AdamWScheduleFree(p, RATE, (0.8, 0.95), foreach=False, **settings)

    assert_same(ours(config, evaluated), torchs(adamw, config, evaluated))
    config = training(optim="schedule_free_sgd", optim_args="weight_lr_power=1", **shared)

    def sgd(p):
        return schedulefree.SGDScheduleFree(p, RATE, weight_lr_power=1, foreach=False, **settings)

    assert_same(ours(config, evaluated), torchs(sgd, config, evaluated))


@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
def test_schedule_free_radam_equals_its_package(evaluated):
    """With the steps before the variance has an estimate, in which nothing moves."""
    shared = {"lr_scheduler_type": "constant", "adam_beta1": 0.8, "adam_beta2": 0.999}
    config = training(optim="schedule_free_radam", **shared)

    def radam(p):
        return schedulefree.RAdamScheduleFree(
            p, RATE, (0.8, 0.999), weight_decay=DECAY, foreach=False
        )

    expected = torchs(radam, config, evaluated, steps=8)
    assert_same(ours(config, evaluated, steps=8), expected)
    for name, array in expected[3].items():
        assert (array == expected[0][name]).all() and (array != expected[4][name]).any()


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.999, 0.9999])
def test_the_rectified_rate_is_exact(beta2):
    """The paper's formula in float64, which float32 would get wrong by some percent."""
    steps = np.array([*range(20), 99, 999, 19_999, 999_999])
    t, rho_inf = steps + 1.0, 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    known = np.where(rho > 4, rho, 5.0)
    factor = (known - 4) * (known - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * known)
    expected = np.where(rho > 4, np.sqrt(factor), 0.0)
    found = _rectified(lambda step: jnp.float32(1.0), beta2)(jnp.asarray(steps))
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def named(kind: str) -> str:
    return next(name for name, own in NAMES.items() if own == kind)


@pytest.mark.parametrize("kind", ["adafactor", "stable_adamw", "lora_muon"])
def test_a_sweep_scales_the_updates(kind):
    """One optimizer with a rate of 1, whose updates are scaled: as each member's own optimizer."""
    fields = {"optim": named(kind), "lr_scheduler_type": "cosine"}
    fields |= {"weight_decay": 0.0} if kind == "lora_muon" else {}
    rates = jnp.array([RATE, 3 * RATE])
    model, trainable = wrapped_stack()
    tx = make_optimizer(training(**fields, learning_rate=1.0), STEPS, model)
    members = jax.tree.map(lambda a: jnp.stack([a, a]), trainable)
    state = jax.vmap(tx.init)(members)

    @jax.jit
    @jax.vmap
    def step(member, state, grads, rate):
        updates, state = tx.update(grads, state, member)
        return optax.apply_updates(member, jax.tree.map(lambda u: u * rate, updates)), state

    for number in range(STEPS):
        grads = gradients(trainable, number)
        members, state = step(
            members, state, jax.tree.map(lambda g: jnp.stack([g, g]), grads), rates
        )
    for index, rate in enumerate(rates.tolist()):
        alone = ours(training(**fields, learning_rate=rate))[-1]
        found = one_by_one(jax.tree.map(lambda a, index=index: a[index], members))
        # Rounding grows where B is nearly singular.
        assert_same([found], [alone], tolerance=5e-3 if kind == "lora_muon" else 2e-5)


@pytest.mark.parametrize("kind", ["adafactor", "stable_adamw", "schedule_free_adamw", "lora_muon"])
def test_state_is_sharded_like_its_parameter(kind):
    constant = {"lr_scheduler_type": "constant"}
    model, trainable = wrapped_stack()
    tx = make_optimizer(training(optim=named(kind), **constant), STEPS, model)
    mesh = make_mesh(2, 2, 2)
    shardings = train_state_shardings(tx, trainable, mesh)
    state = start_state(tx, trainable, shardings)
    wanted = {
        (leaf.shape, sharding.spec)
        for leaf, sharding in zip(
            jax.tree.leaves(trainable), jax.tree.leaves(shardings.trainable), strict=True
        )
        if any(sharding.spec)
    }
    held = {(leaf.shape, leaf.sharding.spec) for leaf in jax.tree.leaves(state.opt_state)}
    assert wanted
    assert kind == "adafactor" or wanted <= held  # whose moments have one axis less
    alone, _ = tx.update(gradients(trainable, 0), tx.init(trainable), trainable)
    update = jax.jit(tx.update, out_shardings=(shardings.trainable, shardings.opt_state))
    grads = place(gradients(trainable, 0), shardings.trainable)
    spread, _ = update(grads, state.opt_state, state.trainable)
    assert_same([one_by_one(spread)], [one_by_one(alone)], tolerance=1e-4)


@pytest.mark.parametrize(
    "kind", ["adafactor", "stable_adamw", "prodigy", "schedule_free_sgd", "lora_muon"]
)
def test_biases_do_not_decay(kind):
    model, trainable = wrapped_stack(lora_bias=True)
    grads = gradients(trainable, 0)

    def updates(decay):
        args = {"d0": 1.0} if kind == "prodigy" else {}
        constant = {"lr_scheduler_type": "constant", "weight_decay": decay}
        tx = make_optimizer(training(optim=named(kind), optim_args=args, **constant), 1, model)
        return one_by_one(tx.update(grads, tx.init(trainable), trainable)[0])

    with_decay = updates(DECAY)
    for name, update in updates(0.0).items():
        differs = np.abs(update - with_decay[name]).max() > 1e-6
        assert differs != name.endswith("lora_bias"), name
