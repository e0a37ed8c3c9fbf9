"""Checkpoints out: what this program saves, transformers loads."""

from __future__ import annotations

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import phi3_jax
from phi3_jax import UserError
from phi3_jax.checkpoint.index import INDEX_FILE
from tests.conftest import tiny_hf_model

TOKENS = np.arange(3, 23, dtype=np.int32)[None]


@pytest.fixture
def checkpoint(tmp_path):
    tiny_hf_model(num_key_value_heads=2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


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
    assert (tmp_path / INDEX_FILE).exists() == (max_shard_size == 100_000)
    theirs = transformers.Phi3ForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(ours(TOKENS), expected, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(phi3_jax.load(tmp_path)(TOKENS), ours(TOKENS))
    assert not list(tmp_path.glob(".*"))


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
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("phi3_jax.checkpoint.saving.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        phi3_jax.save(model, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "phi3"
