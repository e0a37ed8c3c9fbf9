"""Checkpoints in and out: one file, shards, every float type; each error names what is wrong."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import phi3_jax
from phi3_jax import UserError
from phi3_jax.checkpoint import folder
from tests.conftest import tiny_hf_model

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
    assert folder.fingerprint(checkpoint) == folder.fingerprint(tmp_path / "shards")


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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", [10**9, 100_000])
def test_saved_model_loads_in_transformers(tmp_path, tied, max_shard_size):
    config = phi3_jax.Phi3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    ours = phi3_jax.Phi3(config, rngs=nnx.Rngs(0))
    phi3_jax.save(ours, tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / folder.INDEX_FILE).exists() == (max_shard_size == 100_000)
    theirs = transformers.Phi3ForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(ours(TOKENS), expected, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(phi3_jax.load(tmp_path)(TOKENS), ours(TOKENS))
    assert not list(tmp_path.glob(".*"))


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
    assert "not part of the network: model.extra.weight [3]" in message
    assert "model.layers.1.mlp.down_proj.weight: shape [2, 2], config.json asks [64, 96]" in message
    assert "model.layers.2.mlp.down_proj.weight: type I8" in message


def test_old_buffers_and_tied_heads_are_no_misfit(tmp_path):
    tiny_hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    before = phi3_jax.load(tmp_path)(TOKENS)
    edit(tmp_path, change)
    np.testing.assert_array_equal(phi3_jax.load(tmp_path)(TOKENS), before)


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


def test_pickle_is_not_read(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors there"):
        phi3_jax.load(checkpoint)


def test_no_such_folder_and_no_such_repo(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        phi3_jax.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="no-such/model: no such folder, and not to be had"):
        phi3_jax.load("no-such/model")


def test_fingerprint_tells_models_apart(checkpoint):
    before = folder.fingerprint(checkpoint)

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3

    edit(checkpoint, change)
    assert folder.fingerprint(checkpoint) != before


def test_hub_download_takes_no_code_and_no_pickle(checkpoint, monkeypatch):
    asked = {}

    def snapshot_download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert folder.resolve("microsoft/Phi-3-mini-4k-instruct", "abc") == checkpoint
    assert asked["revision"] == "abc"
    assert not [p for p in asked["patterns"] if p.endswith((".py", ".bin", ".pt", "*"))]


def test_saving_a_wrapped_model_is_refused(tmp_path, checkpoint):
    model = phi3_jax.load(checkpoint)
    model.model.norm.extra = nnx.Param(jnp.zeros(3))
    with pytest.raises(UserError, match=r"model\.norm\.extra"):
        phi3_jax.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_json_is_written_last(tmp_path, checkpoint, monkeypatch):
    """A crash while saving leaves no folder that looks whole."""
    model = phi3_jax.load(checkpoint)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("phi3_jax.checkpoint.weights.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        phi3_jax.save(model, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "phi3"
