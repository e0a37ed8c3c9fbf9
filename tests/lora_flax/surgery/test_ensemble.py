"""N adapters trained at once: each the same as trained alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax.encoder import Encoder, tokens
from tests.lora_flax.nets import arrays

SEEDS, RATES = (3, 4, 3), (0.01, 0.02, 0.03)
COMMON = [
    {"target_modules": ["qkv_proj", "up_proj", "embed_tokens", "conv", "head"]},
    {"target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["norm"]},
    {"target_modules": ["up_proj"], "use_dora": True, "bias": "all"},
    {"target_modules": ["up_proj", "head"], "init_lora_weights": "pissa"},
]


def loss(model):
    return (model(tokens()) ** 2).mean()


def train_alone(config: LoraConfig, seed: int, rate: float):
    model = Encoder(nnx.Rngs(0))
    lora_flax.wrap(model, config, nnx.Rngs(seed))
    trains = lora_flax.mark_only_lora_as_trainable(model)
    graphdef, trainable, frozen = nnx.split(model, trains, ...)
    tx, losses = optax.adam(rate), []
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        value, grads = jax.value_and_grad(lambda t: loss(nnx.merge(graphdef, t, frozen)))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    for _ in range(4):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    nnx.update(model, trainable)
    return model, losses


@pytest.mark.parametrize("common", COMMON, ids=lambda fields: str(list(fields)[-1]))
def test_each_is_the_one_trained_alone(common, tmp_path):
    """Seeds, ranks, alphas and learning rates of their own; the adapter leaves at its own rank."""
    ranks = (2, 1, 2)
    configs = [LoraConfig(r=r, lora_alpha=a, **common) for r, a in zip(ranks, (2, 3, 8))]  # noqa: B905
    model = Encoder(nnx.Rngs(0))
    many = lora_flax.wrap_many(model, configs, [nnx.Rngs(seed) for seed in SEEDS])
    tx = optax.scale_by_adam()

    def one(trainable, constants, frozen):
        return loss(nnx.merge(many.graphdef, trainable, constants, frozen))

    @jax.jit
    def step(trainable, state, constants, frozen):
        values, grads = jax.vmap(jax.value_and_grad(one), in_axes=(0, 0, None))(
            trainable, constants, frozen
        )
        updates, state = jax.vmap(tx.update)(grads, state)
        rates = jnp.array(RATES)
        move = lambda p, u: p - rates.reshape(-1, *(1,) * (p.ndim - 1)) * u  # noqa: E731
        return jax.tree.map(move, trainable, updates), state, values

    trainable, state, losses = many.trainable, jax.vmap(tx.init)(many.trainable), []
    for _ in range(4):
        trainable, state, values = step(trainable, state, many.constants, many.frozen)
        losses.append(values)
    many = dataclasses.replace(many, trainable=trainable)
    for index, config in enumerate(configs):
        alone, expected = train_alone(config, SEEDS[index], RATES[index])
        np.testing.assert_allclose([float(v[index]) for v in losses], expected, atol=1e-5)
        lora_flax.put_one(model, many, index)
        ours, theirs = arrays(model), arrays(alone)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
        lora_flax.save_peft(model, tmp_path)
        loaded = Encoder(nnx.Rngs(0))
        if config.bias == "none":
            lora_flax.load_peft(loaded, tmp_path)
            np.testing.assert_allclose(loaded(tokens()), alone(tokens()), rtol=1e-3, atol=1e-4)


def test_the_base_is_read_once():
    """The matmul with a base weight has it without an axis of N."""
    model = Encoder(nnx.Rngs(0))
    config = LoraConfig(r=2, target_modules=["up_proj"])
    many = lora_flax.wrap_many(model, [config] * 5, [nnx.Rngs(seed) for seed in range(5)])

    def one(trainable, constants, frozen):
        return loss(nnx.merge(many.graphdef, trainable, constants, frozen))

    program = jax.jit(jax.vmap(one, in_axes=(0, 0, None)))
    text = program.lower(many.trainable, many.constants, many.frozen).as_text()
    assert "tensor<5x4x7x6xf32>, tensor<6x10xf32>) -> tensor<5x4x7x10xf32>" in text
    assert "tensor<5x6x10xf32>" not in text and "tensor<3x5x6x10xf32>" not in text


def test_what_cannot_be_trained_together():
    model = Encoder(nnx.Rngs(0))
    before = arrays(model)
    one = LoraConfig(r=2, target_modules=["up_proj"])
    with pytest.raises(LoraError, match="not in use_dora"):
        lora_flax.wrap_many(
            model, [one, dataclasses.replace(one, use_dora=True)], [nnx.Rngs(0)] * 2
        )
    with pytest.raises(LoraError, match="1 configs and 0 rngs"):
        lora_flax.wrap_many(model, [one], [])
    assert arrays(model).keys() == before.keys()
