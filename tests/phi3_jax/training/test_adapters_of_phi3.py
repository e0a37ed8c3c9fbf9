"""The names that people write for Phi-3, on a real Phi-3 of transformers, through PEFT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

import lora_flax
import phi3_jax
from tests.conftest import SHAPES, forward, tiny_hf_model
from tests.phi3_jax.peft_models import shaken

SEVEN = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
CASES = {
    "q v up": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "the guide's seven": {"target_modules": SEVEN, "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora of slices": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "head and embedding": {
        "target_modules": ["qkv_proj"],
        "modules_to_save": ["lm_head", "embed_tokens"],
    },
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": [3, 5]},
    "update of the head": {"target_modules": ["lm_head", "o_proj"]},
    "some layers": {"target_modules": ["gate_up_proj"], "layers_to_transform": [1]},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"down_proj": 5}},
    "pissa": {"target_modules": ["q_proj", "v_proj", "o_proj"], "init_lora_weights": "pissa"},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("shape", ["gqa", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_trained_here_loads_in_peft(case, shape, tmp_path):
    """Logits within 2e-4 of PEFT's over transformers' own model."""
    fields = CASES[case]
    if shape == "tied" and "lm_head" in fields.get("modules_to_save", []):
        fields = fields | {"modules_to_save": ["embed_tokens"]}
    base = tiny_hf_model(**(SHAPES[shape] | {"initializer_range": 0.1}))
    base.save_pretrained(tmp_path / "base")
    model = phi3_jax.load(tmp_path / "base")
    lora_flax.wrap(model, lora_flax.LoraConfig(r=2, lora_alpha=3, **fields))
    trains = lora_flax.mark_only_lora_as_trainable(model)
    graphdef, trainable, frozen = nnx.split(model, trains, ...)
    tokens = np.random.default_rng(0).integers(3, 20, (2, 12), dtype=np.int32)

    @jax.jit
    def step(trainable):
        grads = jax.grad(lambda t: (nnx.merge(graphdef, t, frozen)(tokens) ** 2).mean())(trainable)
        return jax.tree.map(lambda p, g: p - 0.02 * jnp.sign(g), trainable, grads)

    before = forward(model, tokens)
    nnx.update(model, step(step(trainable)))
    ours = forward(model, tokens)
    assert abs(ours - before).max() > 1e-2
    lora_flax.save_peft(model, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(ours, logits, rtol=0, atol=2e-4)

    # And back here, over a plain model.
    other = phi3_jax.load(tmp_path / "base")
    lora_flax.load_peft(other, tmp_path / "adapter")
    np.testing.assert_allclose(forward(other, tokens), ours, rtol=0, atol=2e-4)


def test_the_seven_names_mean_every_layer(tmp_path):
    """With PEFT on Phi-3 they mean two of four layers."""
    base = tiny_hf_model(**SHAPES["gqa"])
    base.save_pretrained(tmp_path)
    model = phi3_jax.load(tmp_path)
    report = lora_flax.wrap(model, lora_flax.LoraConfig(r=2, target_modules=SEVEN))
    assert {layer.name.split(".", 3)[-1] for layer in report.layers} == {
        "qkv_proj (q_proj, k_proj, v_proj)",
        "o_proj",
        "gate_up_proj (gate_proj, up_proj)",
        "down_proj",
    }
    lora_flax.save_peft(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 24)  # of three slices of rank 2
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_pefts_adapter_of_the_seven_names_loads_as_what_it_is(tmp_path):
    """Its file holds o_proj and down_proj only, whatever its config lists."""
    base = tiny_hf_model(**SHAPES["gqa"])
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=SEVEN))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    report = lora_flax.load_peft(phi3_jax.load(tmp_path / "base"), tmp_path / "adapter")
    assert {layer.name.split(".")[-1] for layer in report.layers} == {"o_proj", "down_proj"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_of_head_and_embedding_both_ways(tmp_path):
    """PEFT saves the base's weights beside them; they are the base's, so nothing is lost."""
    base = tiny_hf_model(**(SHAPES["gqa"] | {"initializer_range": 0.1}))
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "embed_tokens", "o_proj"])
    adapted = shaken(base, config)
    adapted.save_pretrained(str(tmp_path / "theirs"))
    tokens = np.random.default_rng(0).integers(3, 20, (2, 12), dtype=np.int32)
    with torch.no_grad():
        logits = adapted.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    model = phi3_jax.load(tmp_path / "base")
    lora_flax.load_peft(model, tmp_path / "theirs")
    np.testing.assert_allclose(forward(model, tokens), logits, rtol=0, atol=2e-4)

    lora_flax.save_peft(model, tmp_path / "ours")
    fresh = type(base).from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        back = loaded(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(back, logits, rtol=0, atol=2e-4)

    # Over a base with another head, the file's head counts, as in PEFT; it is written again.
    other, theirs = phi3_jax.load(tmp_path / "base"), type(base).from_pretrained(tmp_path / "base")
    other.lm_head.kernel.set_value(other.lm_head.kernel[...] + 1)
    theirs.lm_head.weight.data += 1
    lora_flax.load_peft(other, tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "theirs").eval()
    with torch.no_grad():
        back = loaded(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(forward(other, tokens), back, rtol=0, atol=2e-4)
    np.testing.assert_allclose(back, logits, rtol=0, atol=2e-4)
    assert "base_model.model.lm_head.base_layer.weight" in lora_flax.to_peft(other).tensors
