"""Quantized bases: loading, checkpoints of bitsandbytes, meshes, a QLoRA run from end to end."""

from __future__ import annotations

import json

import bitsandbytes
import chex
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_flax
import phi3_jax
from lora_flax import BitsAndBytesConfig
from phi3_jax import Checkpoint, UserError
from phi3_jax.sharding.mesh import make_mesh
from tests.conftest import forward, tiny_hf_model

pytestmark = pytest.mark.usefixtures("compiled_anew")

TOKENS = np.arange(3, 43, dtype=np.int32).reshape(2, 20)
SHAPE = {"intermediate_size": 128, "num_key_value_heads": 2, "hidden_size": 64}
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
INT8 = BitsAndBytesConfig(load_in_8bit=True)


def bnb_config(**fields) -> transformers.BitsAndBytesConfig:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return transformers.BitsAndBytesConfig(**nf4 | {"bnb_4bit_use_double_quant": True} | fields)


def logits_of(model, tokens=TOKENS) -> np.ndarray:
    model.eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.training = True  # else it computes in bfloat16 on some CPUs
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


@pytest.fixture
def base(tmp_path):
    tiny_hf_model(**SHAPE).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
def test_loading_quantises_as_quantize_does(base, config):
    loaded = phi3_jax.load(base, quantization=config)
    plain = phi3_jax.load(base)
    lora_flax.quantize(plain, config)
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(plain))
    assert isinstance(loaded.lm_head, type(phi3_jax.load(base).lm_head))
    with pytest.raises(UserError, match="merge and unwrap"):
        phi3_jax.save(loaded, base.parent / "out")


def test_logits_are_those_of_bitsandbytes(base):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=bnb_config(), dtype=torch.float32
    )
    ours = phi3_jax.load(base, quantization=NF4)
    np.testing.assert_allclose(forward(ours, TOKENS), logits_of(theirs), rtol=0, atol=2e-4)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_checkpoint_that_is_quantised_already(base, tmp_path, double, quant_type):
    config = bnb_config(bnb_4bit_use_double_quant=double, bnb_4bit_quant_type=quant_type)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "four")
    ours = Checkpoint.open(tmp_path / "four").load("float32")
    np.testing.assert_allclose(forward(ours, TOKENS), logits_of(theirs), rtol=0, atol=2e-4)
    codes = ours.model.layers.mlp.down_proj.kernel.codes
    direct = phi3_jax.load(base, quantization=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double
    ))  # fmt: skip
    np.testing.assert_array_equal(codes, direct.model.layers.mlp.down_proj.kernel.codes)
    with pytest.raises(UserError, match=r"qkv_proj\.weight is already quantized"):
        Checkpoint.open(tmp_path / "four").kernel("model.layers.0.self_attn.qkv_proj")
    with pytest.raises(UserError, match="remove model.quantization"):
        Checkpoint.open(tmp_path / "four").load("float32", quantization=NF4)
    with pytest.raises(UserError, match="the checkpoint is quantized"):
        phi3_jax.load(tmp_path / "four")
    other = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=not double,
                               bnb_4bit_quant_type=quant_type)  # fmt: skip
    with pytest.raises(UserError, match="double quantization"):
        phi3_jax.load(tmp_path / "four", quantization=other)


def test_damaged_quantised_checkpoints(base, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=bnb_config(), dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "four")
    file = tmp_path / "four" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"
    fields = json.loads(tensors[state].tobytes())

    def replace(**changed) -> None:
        save_file(tensors | changed, file, metadata={"format": "pt"})

    for change, said in (
        ({state: np.frombuffer(b"{", np.uint8)}, "is damaged"),
        (
            {state: np.frombuffer(json.dumps(fields | {"blocksize": 128}).encode(), np.uint8)},
            "block sizes",
        ),
        (
            {state: np.frombuffer(json.dumps(fields | {"shape": [128, 64]}).encode(), np.uint8)},
            r"shape \[128, 64\], config.json expects \[64, 128\]",
        ),
        ({name: np.zeros((7, 1), np.uint8)}, name),
        ({f"{name}.zero_point": np.zeros(1, np.uint8)}, "zero_point"),
    ):
        replace(**change)
        with pytest.raises(UserError, match=said):
            Checkpoint.open(tmp_path / "four").load("float32")
    parts = {key: value for key, value in tensors.items() if not key.startswith(name)}
    save_file(parts | {name: np.zeros((64, 128), np.float32)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not quantized, but other weights here are"):
        Checkpoint.open(tmp_path / "four").load("float32")
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "four" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="gptq"):
        phi3_jax.load(tmp_path / "four", quantization=NF4)


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_on_a_mesh(tmp_path, axes):
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8}
    tiny_hf_model(**shape | {"num_key_value_heads": 8, "initializer_range": 0.05}).save_pretrained(
        tmp_path
    )
    one = phi3_jax.load(tmp_path, quantization=NF4)
    many = phi3_jax.load(tmp_path, quantization=NF4, mesh=make_mesh(*axes))
    codes = many.model.layers.mlp.gate_up_proj.kernel.codes
    assert codes.sharding.num_devices == 8 and (axes[1:] == (1, 1)) == codes.is_fully_replicated
    np.testing.assert_array_equal(codes, one.model.layers.mlp.gate_up_proj.kernel.codes)
    np.testing.assert_allclose(forward(many, TOKENS), forward(one, TOKENS), rtol=0, atol=1e-4)
