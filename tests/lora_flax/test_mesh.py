"""Stacked, jitted, vmapped and on a sharded mesh: the same numbers everywhere."""

import jax
import numpy as np
import pytest
from flax import nnx

import lora_flax
from lora_flax import LoraConfig
from tests.conftest import forward
from tests.lora_flax.encoder import Encoder, tokens

OPTIONS = [
    {"target_modules": ["qkv_proj", "up_proj", "embed_tokens", "conv", "head"], "lora_bias": False},
    {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"layers.1.q_proj": 1}},
    {"target_modules": ["up_proj", "head"], "use_dora": True, "modules_to_save": ["norm"]},
    {"target_modules": ["up_proj", "head"], "init_lora_weights": "pissa"},
]


def build(fields) -> Encoder:
    model = Encoder(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, **fields))
    trains = lora_flax.mark_only_lora_as_trainable(model)
    graphdef, trainable, frozen = nnx.split(model, trains, ...)

    @jax.jit
    def step(trainable):
        grads = jax.grad(lambda t: (nnx.merge(graphdef, t, frozen)(tokens()) ** 2).sum())(trainable)
        return jax.tree.map(lambda p, g: p - 0.01 * g, trainable, grads)

    nnx.update(model, step(trainable))
    return model


@pytest.mark.parametrize("fields", OPTIONS, ids=lambda fields: str(list(fields)[-1]))
def test_jit_and_vmap(fields):
    model = build(fields)
    graphdef, state = nnx.split(model)

    def run(state, ids):
        return nnx.merge(graphdef, state)(ids)

    expected = model(tokens())
    np.testing.assert_allclose(jax.jit(run)(state, tokens()), expected, rtol=1e-5, atol=1e-5)
    by_row = jax.vmap(run, in_axes=(None, 0))(state, tokens()[:, None])[:, 0]
    np.testing.assert_allclose(by_row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiled_anew", "optimized")
@pytest.mark.parametrize("fields", OPTIONS, ids=lambda fields: str(list(fields)[-1]))
def test_on_a_sharded_mesh(fields):
    """Every array cut over 2 x 4 simulated devices where its axes divide."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf):
        axes: list = [None] * leaf.ndim
        if leaf.ndim >= 2:
            axes[-2] = "fsdp" if leaf.shape[-2] % 2 == 0 else None
            axes[-1] = "tensor" if leaf.shape[-1] % 4 == 0 else None
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*axes)))

    model = build(fields)
    expected = forward(model, tokens())
    trains = lora_flax.mark_only_lora_as_trainable(model)
    graphdef, *parts = nnx.split(model, trains, ...)
    grad = jax.jit(jax.grad(lambda t, f: (nnx.merge(graphdef, t, f)(tokens()) ** 2).sum()))
    wanted = grad(*parts)
    trainable, frozen = (jax.tree.map(place, part) for part in parts)
    grads = grad(trainable, frozen)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs) + 1e-6
    run = jax.jit(lambda t, f: nnx.merge(graphdef, t, f)(tokens()))
    np.testing.assert_allclose(run(trainable, frozen), expected, rtol=1e-4, atol=1e-5)
    nnx.update(model, trainable, frozen)
    lora_flax.merge(model)
    np.testing.assert_allclose(forward(model, tokens()), expected, rtol=1e-4, atol=1e-4)
