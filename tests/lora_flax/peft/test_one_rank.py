"""One rank for all pairs of a file: every reader's formula gives the scale that was trained."""

import json

import chex
import numpy as np
import peft
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax.encoder import (
    Encoder,
    peft_model,
    shake_torch,
    to_torch,
    tokens,
    torch_output,
    trained,
)
from tests.lora_flax.init.test_eva import batches
from tests.lora_flax.nets import arrays, randomize

# What has one scale: alpha over rank is 3 everywhere.
ONE_SCALE = {
    "slices": {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "one slice": {"r": 1, "lora_alpha": 3, "target_modules": ["v_proj"]},
    "ranks": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["qkv_proj", "up_proj", "embed_tokens", "conv", "head"],
        "rank_pattern": {"up_proj": 4, r"layers\.1\.attn\.qkv_proj": 1, "conv": 3, "head": 5},
        "alpha_pattern": {"up_proj": 12, r"layers\.1\.attn\.qkv_proj": 3, "conv": 9, "head": 15},
    },
    "ranks of slices": {
        "r": 1,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.0\.down_proj": 3},
        "alpha_pattern": {"q_proj": 6, r"layers\.0\.down_proj": 9},
        "layers_to_transform": [0, 2],
    },
    "dora": {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "bias": {"r": 1, "lora_alpha": 3, "target_modules": ["k_proj", "head"], "lora_bias": True},
    "rslora": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["up_proj", "head"],
        "rank_pattern": {"head": 1},
        "alpha_pattern": {"head": 3},
    },
    "pissa": {
        "r": 1,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "init_lora_weights": "pissa",
    },
}


@pytest.fixture(params=ONE_SCALE)
def fields(request) -> dict:
    return ONE_SCALE[request.param]


def written(folder) -> tuple[dict, dict[str, np.ndarray]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def ranks(tensors: dict[str, np.ndarray]) -> set[int]:
    return {
        value.shape[0]
        for key, value in tensors.items()
        if key.endswith(("lora_A.weight", "lora_embedding_A"))
    }


def test_every_formula_gives_the_trained_scale(fields, tmp_path):
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model)
    lora_flax.wrap(model, LoraConfig(**fields))
    trained(model)
    out = model(tokens())
    lora_flax.save_peft(model, tmp_path, task_type=None)
    config, tensors = written(tmp_path)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    # llama.cpp divides by the rows of each A, the others by r.
    assert ranks(tensors) == {config["r"]}
    assert config["lora_alpha"] / config["r"] == pytest.approx(3, rel=1e-12)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    np.testing.assert_allclose(out, torch_output(loaded), rtol=1e-4, atol=1e-4)


def test_loading_drops_the_padding(fields, tmp_path):
    """What is loaded has the ranks that were trained, and is written as it was."""
    model = Encoder(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(**fields))
    trained(model)
    out = model(tokens())
    lora_flax.save_peft(model, tmp_path / "first")
    other = Encoder(nnx.Rngs(0))
    report = lora_flax.load_peft(other, tmp_path / "first")
    np.testing.assert_allclose(other(tokens()), out, rtol=1e-5, atol=1e-5)
    _, tensors = written(tmp_path / "first")
    padding = sum(value.size for value in tensors.values()) - report.trainable
    several = "rank_pattern" in fields or len(fields["target_modules"]) > 2
    assert (padding > 0) == several
    lora_flax.save_peft(other, tmp_path / "second")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    if fields.get("init_lora_weights") is not None:
        return  # the file of a nonzero start has twice its rank

    before = arrays(model, nnx.LoRAParam)
    trained(model)
    lora_flax.load_peft(model, tmp_path / "first")
    chex.assert_trees_all_close(arrays(model, nnx.LoRAParam), before, rtol=1e-6)


def test_rslora_can_stay(tmp_path):
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model)
    fields = ONE_SCALE["rslora"] | {"target_modules": ["up_proj", "q_proj", "v_proj"]}
    fields |= {"r": 1, "lora_alpha": 3, "rank_pattern": {}, "alpha_pattern": {}}
    lora_flax.wrap(model, LoraConfig(**fields))
    trained(model)
    lora_flax.save_peft(model, tmp_path, task_type=None, keep_rslora=True)
    config, tensors = written(tmp_path)
    assert config["use_rslora"] is True and ranks(tensors) == {2} == {config["r"]}
    assert config["lora_alpha"] == pytest.approx(3 * 2**0.5)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    np.testing.assert_allclose(model(tokens()), torch_output(loaded), rtol=1e-4, atol=1e-4)
    other = Encoder(nnx.Rngs(0))
    lora_flax.load_peft(other, tmp_path)
    np.testing.assert_allclose(other(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)


def test_different_scales_keep_their_patterns(tmp_path):
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model)
    fields = {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    lora_flax.wrap(model, LoraConfig(**fields, alpha_pattern={"up_proj": 4}))
    trained(model)
    lora_flax.save_peft(model, tmp_path, task_type=None)
    config, tensors = written(tmp_path)
    assert config["rank_pattern"] == {"qkv_proj": 2}
    assert (config["lora_alpha"], config["alpha_pattern"]) == (6, {"up_proj": 4})
    assert ranks(tensors) == {1, 2}
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    np.testing.assert_allclose(model(tokens()), torch_output(loaded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_slices_of_different_scales_come_back(lora_bias, tmp_path):
    """B and its bias make up for the one scale of the fused pair, and back."""
    config = LoraConfig(
        r=1,
        lora_alpha=3,
        target_modules=["q_proj", "k_proj"],
        alpha_pattern={"k_proj": 5},
        lora_bias=lora_bias,
    )
    model, other = Encoder(nnx.Rngs(0)), Encoder(nnx.Rngs(0))
    plain = to_torch(model)
    for each in (model, other):
        lora_flax.wrap(each, config)
    trained(model)
    lora_flax.save_peft(model, tmp_path, task_type=None)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    np.testing.assert_allclose(model(tokens()), torch_output(loaded), rtol=1e-4, atol=1e-4)
    lora_flax.load_peft(other, tmp_path)
    np.testing.assert_allclose(other(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)


def test_the_ranks_of_eva_become_one(tmp_path):
    """They are redistributed between the layers, at one scale."""
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model)
    targets = ["qkv_proj", "up_proj", "down_proj", "head"]
    lora_flax.wrap(
        model, LoraConfig(r=1, lora_alpha=1.5, target_modules=targets, init_lora_weights="eva")
    )
    report = lora_flax.initialize_lora_eva_weights(
        model, batches(), lambda net, ids: net(ids), rho=2.0
    )
    assert len({layer.r for layer in report.layers}) > 1
    trained(model)
    lora_flax.save_peft(model, tmp_path, task_type=None)
    config, tensors = written(tmp_path)
    assert config["r"] == 2 and ranks(tensors) == {config["r"]}
    assert config["lora_alpha"] / config["r"] == pytest.approx(1.5)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    np.testing.assert_allclose(model(tokens()), torch_output(loaded), rtol=1e-4, atol=1e-4)
    other = Encoder(nnx.Rngs(0))
    assert lora_flax.load_peft(other, tmp_path).trainable == report.trainable


def test_zero_rows_anywhere_are_dropped(tmp_path):
    """A file that PEFT wrote has them anywhere; a pair of zeros keeps one row."""
    model = Encoder(nnx.Rngs(0))
    twin = peft_model(model, r=3, lora_alpha=5, target_modules=["up_proj", "embed_tokens"])
    shake_torch(twin)
    twin.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key, value in tensors.items():
        rows = value if "_A" in key else value.T  # a view
        rows[[0, 2] if "embed" in key else [1]] = 0
        if ".1.up_proj" in key:
            rows[:] = 0
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    report = lora_flax.load_peft(model, tmp_path)
    assert [layer.r for layer in report.layers] == ["1", "1-2"]
    again = peft.PeftModel.from_pretrained(to_torch(Encoder(nnx.Rngs(0))), str(tmp_path))
    np.testing.assert_allclose(model(tokens()), torch_output(again), rtol=1e-4, atol=1e-4)


def test_a_grouped_convolution_is_padded_by_group(tmp_path):
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(4, 6, (3,), padding=1, feature_group_count=2, rngs=rngs)
            self.head = nnx.Linear(6, 8, rngs=rngs)

        def __call__(self, x):
            return self.head(self.conv(x))

    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    model, other = Model(), Model()
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["conv", "head"],
        rank_pattern={"head": 5}, alpha_pattern={"head": 10},
    )  # fmt: skip
    lora_flax.wrap(model, config)
    randomize(model)  # no rank is padded in the model
    lora_flax.save_peft(model, tmp_path)
    config, tensors = written(tmp_path)
    assert config["r"] == 6 and ranks(tensors) == {6}  # 5, rounded up to a multiple of the groups
    report = lora_flax.load_peft(other, tmp_path)
    assert [layer.r for layer in report.layers] == ["2", "5"]
    np.testing.assert_allclose(other(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_larger_rank_does_not_fit_a_wrapped_model(tmp_path):
    """Padding fits, more trained rows do not."""
    model = Encoder(nnx.Rngs(0))
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["up_proj"]}
    lora_flax.wrap(model, LoraConfig(**fields))
    trained(model)
    lora_flax.save_peft(model, tmp_path)
    other = Encoder(nnx.Rngs(0))
    lora_flax.wrap(other, LoraConfig(**fields | {"r": 2, "lora_alpha": 4}))
    with pytest.raises(LoraError, match=r"r of layers.up_proj is \[2\] in the model, \[3\]"):
        lora_flax.load_peft(other, tmp_path)
