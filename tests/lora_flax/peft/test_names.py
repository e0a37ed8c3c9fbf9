"""The names in a file mean exactly what was trained, to PEFT and here."""

import json
import re

import numpy as np
import peft
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lora_flax
from lora_flax import LoraConfig, LoraError
from lora_flax.index import ModelIndex
from lora_flax.targets.matching import select_targets
from tests.lora_flax.encoder import Encoder, to_torch, tokens, torch_output, trained
from tests.lora_flax.nets import DEPTH


class Normed(Encoder):
    """With a second norm, whose name ends in the first one's."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.final = nnx.Dict(norm=nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs))
        self.layernorm = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)


def selected(targets, **fields) -> set[str]:
    """The layers and slices that a config selects."""
    config = LoraConfig(r=1, target_modules=targets, **fields)
    return {
        target.layer.slice_name(name, part)
        for target in select_targets(ModelIndex(Encoder(nnx.Rngs(0))), config)
        for name, ranks in zip(target.layer.names, target.spec.ranks, strict=True)
        for part, rank in zip(target.spec.slices, ranks, strict=True)
        if rank
    }


@pytest.mark.parametrize("layers", [1, [0, 1], []])
def test_full_names_hold_whatever_layers_to_transform_says(layers):
    targets = ["layers.2.attn.qkv_proj", "layers.0.down_proj", "up_proj"]
    # Without the pattern, PEFT expects a component before `layers`.
    fields = {"layers_to_transform": layers} | ({"layers_pattern": "layers"} if layers else {})
    config = peft.LoraConfig(r=1, target_modules=targets, **fields)
    twin = peft.get_peft_model(to_torch(Encoder(nnx.Rngs(0))), config)
    theirs = {
        name.removeprefix("base_model.model.")
        for name, module in twin.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert {"layers.2.attn.qkv_proj", "layers.0.down_proj"} < theirs
    assert selected(targets, **fields) == theirs
    slices = selected(["layers.2.attn.q_proj", "v_proj"], layers_to_transform=0)
    assert slices == {"layers.2.attn.q_proj", "layers.0.attn.v_proj"}


@pytest.mark.parametrize(
    ("pattern", "slices"),
    [
        (r".*\.(q|v)_proj", {"q_proj", "v_proj"}),
        (r"layers\.\d+\.attn\.[qk]_proj", {"q_proj", "k_proj"}),
        (r".*attn\.(?!qkv)\w+", set()),
        (r".*attn\.(?!qkv)\w+_proj", set()),
        (r".*attn\.(?!qkv)[a-z]_proj", set()),
        (r".*(?<!qkv)_proj", set()),
        (r".*attn\.[^.]{6}", set()),
    ],
)
def test_a_regular_expression_means_slices_only_by_their_names(pattern, slices):
    try:
        names = selected(pattern)
    except LoraError as error:
        assert "matched no layer" in str(error)
        names = set()
    assert {name.split(".")[-1] for name in names if ".attn." in name} == slices
    others = {name for name in names if ".attn." not in name}
    assert others == {
        f"layers.{i}.{name}"
        for i in range(DEPTH)
        for name in ("up_proj", "down_proj")
        if re.fullmatch(pattern, f"layers.{i}.{name}")
    }


def test_unfused_names_mean_the_layers_that_were_trained(tmp_path):
    """Other layers of the model that it is for have projections of the same names."""
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model, unfused=True)
    fields = {"r": 1, "lora_alpha": 3, "layers_to_transform": [1]}
    lora_flax.wrap(model, LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], **fields))
    trained(model)
    lora_flax.save_peft(model, tmp_path, task_type=None, unfused=True)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert peft.get_peft_model_state_dict(loaded).keys() == ours.keys()
    assert {key.split("layers.")[1][0] for key in ours} == {"1"}
    other = Encoder(nnx.Rngs(0))
    lora_flax.load_peft(other, tmp_path)
    np.testing.assert_allclose(other(tokens()), torch_output(loaded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (["final.norm"], ["final.norm"]),
        (["norm"], ["final.norm", "layernorm", "norm"]),
        (["layernorm"], ["layernorm"]),
        (["head"], ["head"]),
    ],
)
def test_a_module_to_save_is_written_as_no_other(targets, written, tmp_path):
    """PEFT matches the end of the text: `norm` also means `layernorm`."""
    model = Normed(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=1, target_modules=["conv"], modules_to_save=targets))
    lora_flax.save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == written


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["layers.1.up_proj"]},
        {"modules_to_save": ["layers.1"]},
        {"modules_to_save": ["0.attn", "layers.2.down_proj", "head"]},
        {"modules_to_save": ["2.up_proj"], "use_dora": True},
    ],
    ids=str,
)
def test_a_module_of_one_layer_trains_alone(fields, tmp_path):
    """The other layers of its stack have updates, and the file holds what PEFT's would."""
    targets = ["qkv_proj", "up_proj", "down_proj"]
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model)
    report = lora_flax.wrap(model, LoraConfig(r=2, target_modules=targets, **fields))
    before = model(tokens())
    trained(model)
    out = model(tokens())
    assert abs(out - before).max() > 1e-2
    lora_flax.save_peft(model, tmp_path, task_type=None)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path), is_trainable=True)
    np.testing.assert_allclose(out, torch_output(loaded), rtol=1e-4, atol=1e-4)
    assert report.trainable == sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert peft.get_peft_model_state_dict(loaded).keys() == ours.keys()

    for other in (Encoder(nnx.Rngs(0)), model):  # plain, and wrapped
        lora_flax.load_peft(other, tmp_path)
        np.testing.assert_allclose(other(tokens()), out, rtol=1e-5, atol=1e-5)
    lora_flax.merge(model)
    np.testing.assert_allclose(model(tokens()), out, rtol=1e-4, atol=1e-4)
    lora_flax.unmerge(model)
    lora_flax.merge_and_unload(model)
    np.testing.assert_allclose(model(tokens()), out, rtol=1e-4, atol=1e-4)
    theirs = loaded.merge_and_unload().state_dict()
    for name, value in to_torch(model).state_dict().items():
        np.testing.assert_allclose(value.numpy(), theirs[name].numpy(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_both_is_refused():
    config = LoraConfig(r=1, target_modules=["embed_tokens"], trainable_token_indices=[3])
    model = Encoder(nnx.Rngs(0))
    with pytest.raises(LoraError, match="embed_tokens cannot have an update and"):
        lora_flax.wrap(model, config)
    assert not ModelIndex(model).owners
    # PEFT's tokens of a head would lose its bias.
    config = LoraConfig(r=1, target_modules=["conv"], trainable_token_indices={"head": [3]})
    with pytest.raises(LoraError, match="no embedding 'head', nor an output head"):
        lora_flax.wrap(model, config)
