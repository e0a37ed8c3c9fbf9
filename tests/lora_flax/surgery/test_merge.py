"""Folding adapters into the base, and back."""

import chex
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_flax
from lora_flax import LoraConfig
from tests.lora_flax.encoder import VOCAB, Encoder, trained
from tests.lora_flax.nets import WIDTH, Listed, Stacked, arrays, batch, randomize

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


def test_a_merged_model_saves_what_it_did_before(tmp_path):
    """Base weights and biases that belong to the file, and DoRA's norms, are those of the base."""
    model = Encoder(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    trained(model)
    lora_flax.save_peft(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    table = np.random.default_rng(0).normal(size=(VOCAB, WIDTH)).astype(np.float32)
    key = "base_model.model.embed_tokens.base_layer.weight"
    save_file(load_file(file) | {key: table}, file, {"format": "pt"})
    model = Encoder(nnx.Rngs(0))
    lora_flax.load_peft(model, tmp_path)
    for name, target, fields in (
        ("biased", "head", {"bias": "lora_only", "lora_bias": True}),
        ("dora", "q_proj", {"use_dora": True}),
        ("other", "v_proj", {}),
    ):
        lora_flax.add_adapter(model, name, LoraConfig(r=2, target_modules=[target], **fields))
    randomize(model)
    names = lora_flax.adapter_names(model)
    lora_flax.set_adapter(model, names)
    before = [lora_flax.to_peft(model, adapter_name=name).tensors for name in names]
    assert any(key in tensors for tensors in before) and len(names) == 4
    lora_flax.merge(model)
    after = [lora_flax.to_peft(model, adapter_name=name).tensors for name in names]
    chex.assert_trees_all_equal(after, before)
