"""Modules that train in full and hold more than parameters."""

import jax
import numpy as np
import pytest
from flax import nnx

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax.nets import WIDTH, arrays, batch


class Head(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, norm: bool):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs) if norm else nnx.LayerNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(self.norm(x)))


class Classifier(nnx.Module):
    def __init__(self, norm: bool = False):
        rngs = nnx.Rngs(0, dropout=1)
        self.proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = Head(rngs, norm)

    def __call__(self, x):
        return self.head(self.proj(x))


CONFIG = LoraConfig(r=2, target_modules=["proj"], modules_to_save=["head"])


def test_dropout_inside_draws_on():
    """Its random state is the base's, so each call drops other values, as in the plain model."""
    plain, model = Classifier(), Classifier()
    lora_flax.wrap(model, CONFIG)
    x = batch()
    outputs = [model(x) for _ in range(2)]
    for output in outputs:
        np.testing.assert_allclose(output, plain(x), rtol=1e-6, atol=1e-6)
    assert abs(outputs[0] - outputs[1]).max() > 0.1
    step = nnx.jit(lambda model: model(x))
    for _ in range(2):
        np.testing.assert_allclose(step(model), plain(x), rtol=1e-6, atol=1e-6)
    model.eval()
    plain.eval()
    trains = lora_flax.mark_only_lora_as_trainable(model)
    assert not any("rngs" in name for name in arrays(model, trains))
    nnx.update(model, jax.tree.map(lambda a: a + 0.5, nnx.state(model, trains)))
    out = model(x)
    assert abs(out - plain(x)).max() > 0.1
    lora_flax.merge_and_unload(model)
    np.testing.assert_allclose(model(x), out, rtol=1e-5, atol=1e-5)


def test_running_statistics_are_refused():
    model = Classifier(norm=True)
    before = arrays(model, nnx.Param).keys()
    with pytest.raises(LoraError, match=r"head has running .*\(head.norm.mean, head.norm.var\)"):
        lora_flax.wrap(model, CONFIG)
    assert arrays(model, nnx.Param).keys() == before
