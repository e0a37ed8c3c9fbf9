"""Checkpoints in: one file, shards, every float type; each error names what is wrong."""

from __future__ import annotations

import collections
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import phi3_jax
from lora_flax import BitsAndBytesConfig
from phi3_jax import Checkpoint, UserError
from phi3_jax.checkpoint.index import INDEX_FILE
from tests.conftest import tiny_hf_model
from tests.phi3_jax.conftest import count_reads

TOKENS = np.arange(3, 23, dtype=np.int32)[None]


@pytest.fixture
def checkpoint(tmp_path):
    tiny_hf_model(num_key_value_heads=2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_shards_equal_one_file(checkpoint, tmp_path):
    theirs = transformers.Phi3ForCausalLM.from_pretrained(checkpoint)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one, many = phi3_jax.load(checkpoint), phi3_jax.load(tmp_path / "shards")
    np.testing.assert_array_equal(one(TOKENS), many(TOKENS))
    assert (
        Checkpoint.open(checkpoint).fingerprint == Checkpoint.open(tmp_path / "shards").fingerprint
    )


@pytest.mark.parametrize("torch_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_types(tmp_path, torch_dtype, dtype):
    theirs = tiny_hf_model().to(getattr(torch, torch_dtype))
    theirs.save_pretrained(tmp_path)
    ours = phi3_jax.load(tmp_path, dtype=dtype)
    kernel = ours.model.layers.self_attn.o_proj.kernel[...]
    assert kernel.dtype == jnp.dtype(dtype)
    for layer in range(3):
        weight = theirs.model.layers[layer].self_attn.o_proj.weight
        expected = weight.to(getattr(torch, dtype)).float().detach().numpy().T
        np.testing.assert_array_equal(kernel[layer].astype(np.float32), expected)


def test_every_misfit_in_one_error(checkpoint):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = np.zeros(3, np.float32)
        name = "model.layers.1.mlp.down_proj.weight"
        tensors[name] = np.zeros((2, 2), np.float32)
        name = "model.layers.2.mlp.down_proj.weight"
        tensors[name] = np.zeros((64, 96), np.int8)

    edit(checkpoint, change)
    with pytest.raises(UserError) as caught:
        phi3_jax.load(checkpoint)
    message = str(caught.value)
    assert "missing: model.norm.weight" in message
    assert "unexpected: model.extra.weight [3]" in message
    assert "layers.1.mlp.down_proj.weight: shape [2, 2], config.json expects [64, 96]" in message
    assert "model.layers.2.mlp.down_proj.weight: dtype I8" in message


def test_old_buffers_and_tied_heads_are_no_misfit(tmp_path):
    tiny_hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    before = phi3_jax.load(tmp_path)(TOKENS)
    edit(tmp_path, change)
    np.testing.assert_array_equal(phi3_jax.load(tmp_path)(TOKENS), before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(checkpoint, value):
    names = ["model.layers.1.self_attn.o_proj.weight", "model.norm.weight"]

    def spoil(tensors):
        for name in names:
            tensors[name].reshape(-1)[-1] = value

    edit(checkpoint, spoil)
    skip = ["down_proj", "lm_head"]  # 96 inputs
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    for quantization in (None, in_4_bits):
        with pytest.raises(UserError, match="model.safetensors: .* not finite") as caught:
            Checkpoint.open(checkpoint).load("float32", None, quantization)
        assert all(name in str(caught.value) for name in names)
        assert "layers.0" not in str(caught.value)


def test_weights_that_float16_cannot_hold(checkpoint):
    edit(checkpoint, lambda tensors: tensors["model.norm.weight"].__imul__(1e6))
    phi3_jax.load(checkpoint, dtype="bfloat16")
    with pytest.raises(UserError, match=r"model.norm.weight: .* exceed float16's 65504"):
        phi3_jax.load(checkpoint, dtype="float16")


def test_truncated_file(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        phi3_jax.load(checkpoint)


def test_missing_shard(checkpoint, tmp_path):
    theirs = transformers.Phi3ForCausalLM.from_pretrained(checkpoint)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    victim = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(UserError, match=victim.name):
        phi3_jax.load(tmp_path / "shards")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "not a safetensors index"),
        ([], "not a safetensors index"),
        ({}, "not a safetensors index"),
        ({"a": 1}, "places a in 1, not in this folder"),
        ({"a": "../model.safetensors"}, "not in this folder"),
        ({"a": "/etc/passwd"}, "not in this folder"),
        ({"a": "x" * 300}, "lists missing shards: xxx"),
        ({"a": "\ud800.safetensors"}, "lists missing shards"),
        ({str(n): f"{n}.safetensors" for n in range(12)}, "9.safetensors, and 2 more|and 2 more"),
    ],
)
def test_an_index_names_files_of_its_folder(checkpoint, weight_map, message):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        Checkpoint.open(checkpoint).tensors  # noqa: B018


@pytest.mark.parametrize("with_shards", [False, True])
def test_one_file_beside_the_index_of_an_earlier_model(checkpoint, tmp_path, with_shards):
    """It is the model, as for transformers, whether the earlier model's shards are left or not."""
    old = tiny_hf_model(1, num_key_value_heads=2)
    old.save_pretrained(tmp_path / "old", max_shard_size="100KB")
    shutil.copy(tmp_path / "old" / INDEX_FILE, checkpoint)
    if with_shards:
        for shard in (tmp_path / "old").glob("model-*-of-*.safetensors"):
            shutil.copy(shard, checkpoint)
    theirs = transformers.Phi3ForCausalLM.from_pretrained(checkpoint)
    expected = theirs.model.norm.weight.detach().numpy(), theirs.lm_head.weight.detach().numpy()
    ours = phi3_jax.load(checkpoint)
    np.testing.assert_array_equal(ours.model.norm.weight[...], expected[0])
    np.testing.assert_array_equal(ours.lm_head.kernel[...].T, expected[1])


def test_one_tensor_in_two_files(checkpoint):
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "old.safetensors")
    with pytest.raises(UserError, match="is in model.safetensors and in old.safetensors; remove"):
        Checkpoint.open(checkpoint).tensors  # noqa: B018


def test_odd_tensors_and_files(checkpoint):
    """A scalar and a tensor without rows are named as unexpected; a FIFO is not waited for."""
    odd = {"scalar": np.asarray(1, np.float32), "empty": np.zeros((0, 3), np.float32)}
    save_file(odd, checkpoint / "odd.safetensors")
    opened = Checkpoint.open(checkpoint)
    assert opened.fingerprint
    with pytest.raises(UserError, match=r"unexpected: empty \[0, 3\]\n  unexpected: scalar \[\]"):
        opened.load()
    save_file({"x" * 50_000: odd["empty"]}, checkpoint / "odd.safetensors")
    with pytest.raises(UserError, match=r"unexpected: xxx") as caught:
        Checkpoint.open(checkpoint).load()
    assert len(str(caught.value)) < 2000
    single = checkpoint / "model.safetensors"
    single.rename(checkpoint / "whole.safetensors")
    os.mkfifo(checkpoint / INDEX_FILE)
    with pytest.raises(UserError, match=r"^[^:]*index.json: not a regular file$"):
        Checkpoint.open(checkpoint).load()
    (checkpoint / INDEX_FILE).unlink()
    (checkpoint / "odd.safetensors").unlink()
    os.mkfifo(checkpoint / "odd.safetensors")
    with pytest.raises(UserError, match="odd.safetensors: not a regular file"):
        Checkpoint.open(checkpoint).load()


def test_pickle_is_not_read(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors files"):
        phi3_jax.load(checkpoint)


def test_fingerprint_tells_models_apart(checkpoint):
    before = Checkpoint.open(checkpoint).fingerprint

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3

    edit(checkpoint, change)
    assert Checkpoint.open(checkpoint).fingerprint != before


def test_open_needs_config_json_alone(checkpoint):
    """Weights are looked at when they are first needed, and then each bad file is named."""
    (checkpoint / "model.safetensors").write_bytes(b"cut off")
    opened = Checkpoint.open(checkpoint)
    assert opened.config.hidden_size == 64 and opened.quantization is None
    assert opened.bytes("bfloat16") * 2 == opened.bytes("float32")
    for use in (lambda: opened.tensors, lambda: opened.fingerprint, opened.load):
        with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
            use()
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json there"):
        Checkpoint.open(checkpoint)


def test_everything_is_read_once(checkpoint, tmp_path, monkeypatch):
    """config.json, the index, each header; shapes are traced once, with quantization as well."""
    theirs = transformers.Phi3ForCausalLM.from_pretrained(checkpoint)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    read = count_reads(monkeypatch)
    opened = Checkpoint.open(tmp_path / "shards")
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    assert opened.bytes("float32", quantization) < opened.bytes("float32")
    opened.load("float32", quantization=quantization)
    opened.load("float32")
    assert opened.fingerprint == opened.fingerprint
    shards = [file.name for file in (tmp_path / "shards").glob("*.safetensors")]
    files = ["config.json", "model.safetensors.index.json", *shards]
    assert read == collections.Counter({name: 1 for name in [*files, "Phi3"]})


def test_kernels_and_slices(checkpoint):
    opened = Checkpoint.open(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    for name, tensor in opened.tensors.items():
        assert (tensor.dtype, tensor.shape) == ("F32", weights[name].shape)
    name = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(opened.kernel(name), weights[f"{name}.weight"].T)
    part = opened.read(f"{name}.weight", (slice(2, 5), slice(7, 9)))
    np.testing.assert_array_equal(part, weights[f"{name}.weight"][2:5, 7:9])


def test_a_load_leaves_the_shapes_alone(checkpoint):
    """Two loads from one checkpoint share no array."""
    opened = Checkpoint.open(checkpoint)
    first, second = opened.load(), opened.load()
    expected = np.asarray(second(TOKENS))
    first.model.norm.weight.set_value(first.model.norm.weight[...] * 0.0)
    np.testing.assert_array_equal(second(TOKENS), expected)
    np.testing.assert_array_equal(opened.load()(TOKENS), expected)


def test_fingerprints_stay_what_they_were(tmp_path):
    """Runs of earlier releases resume: their checkpoints name the base by this digest."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    norm, codes = np.arange(3000, dtype=np.float32), np.arange(64, dtype=np.uint8)
    head = np.arange(9000).reshape(3, 3000).astype(jnp.bfloat16)
    save_file({"model.norm.weight": norm}, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": head, "codes": codes[:, None]}, tmp_path / "b.safetensors")
    digest = "bd81c370aaa1efedebda90edc6ba4b1ecebe35a401cf9e9a7f2c87ec3f34cd3c"
    assert Checkpoint.open(tmp_path).fingerprint == digest
