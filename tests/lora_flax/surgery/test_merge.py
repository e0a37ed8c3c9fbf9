"""Folding adapters into the base, and back."""

import chex
import numpy as np
import pytest
from flax import nnx

import lora_flax
from lora_flax import LoraConfig
from tests.lora_flax.nets import Listed, Stacked, arrays, batch, randomize

ALL = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")


@pytest.fixture(params=[Listed, Stacked])
def model(request):
    return request.param(nnx.Rngs(0))


def test_merge_and_unmerge_come_back_bitwise(model):
    lora_flax.wrap(model, ALL)
    randomize(model)
    x, before, out = batch(), arrays(model), model(batch())
    for _ in range(3):
        lora_flax.merge(model)
        np.testing.assert_allclose(model(x), out, rtol=1e-4, atol=1e-4)
        assert any((arrays(model)[name] != value).any() for name, value in before.items())
        lora_flax.unmerge(model)
        after = arrays(model)
        chex.assert_trees_all_equal(after, before)
        assert (model(x) == out).all()


@pytest.mark.parametrize("merged", [False, True])
def test_merge_and_unload_leaves_a_plain_model(model, merged):
    x, plain = batch(), arrays(model).keys()
    lora_flax.wrap(model, ALL)
    randomize(model)
    out = model(x)
    if merged:
        lora_flax.merge(model)
    lora_flax.merge_and_unload(model)
    assert arrays(model).keys() == plain
    np.testing.assert_allclose(model(x), out, rtol=1e-4, atol=1e-4)
