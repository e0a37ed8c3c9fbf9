"""`rope_factors: short` and `long`: transformers with both lists of factors the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import phi3_jax
from phi3_jax.config.sections import ModelConfig
from phi3_jax.training.setup import set_up
from tests.conftest import LONGROPE, forward, tiny_hf_model
from tests.phi3_jax.conftest import chats, checkpoint, make_config  # noqa: F401

BEYOND = LONGROPE["original_max_position_embeddings"] + 20


@pytest.fixture(params=["short", "long"])
def pair(request, tmp_path):
    """transformers' model with one list of factors in both places, and this program's setting."""
    model = tiny_hf_model(**LONGROPE)
    model.save_pretrained(tmp_path)
    scaling = dict(LONGROPE["rope_scaling"])
    scaling |= dict.fromkeys(("short_factor", "long_factor"), scaling[f"{request.param}_factor"])
    changed = tiny_hf_model(**LONGROPE | {"rope_scaling": scaling})
    changed.load_state_dict(model.state_dict())
    return changed, phi3_jax.load(tmp_path, rope_factors=request.param)


@pytest.mark.parametrize("length", [12, BEYOND])
def test_logits(pair, length):
    theirs, ours = pair
    tokens = np.random.default_rng(0).integers(3, 128, (2, length)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(forward(ours, tokens), expected, rtol=0, atol=2e-4)


def test_generation_across_the_original_length(pair):
    theirs, ours = pair
    prompt = np.random.default_rng(1).integers(3, 128, BEYOND - 30).tolist()
    new = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None
    )[0, len(prompt) :]
    assert phi3_jax.generate(ours, [prompt], 40) == [new.tolist()]


def test_a_model_without_longrope_has_no_choice(tmp_path):
    tiny_hf_model().save_pretrained(tmp_path)
    assert phi3_jax.load(tmp_path, rope_factors="long").config.longrope is None


def test_by_batch_by_its_old_name(tmp_path):
    tiny_hf_model(**LONGROPE).save_pretrained(tmp_path)
    assert phi3_jax.load(tmp_path, longrope_by_batch=True).config.longrope.choice == "by_batch"


def test_a_run_trains_with_them_and_warns_without(checkpoint, chats, tmp_path):  # noqa: F811
    folder = tmp_path / "long"
    factors = [1.0 + i for i in range(16)]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": factors},
        "original_max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    config = make_config(folder, chats, tmp_path / "run")
    plain = set_up(config)
    assert plain.model.config.longrope.choice == "by_text"
    assert "set model.rope_factors: long" in plain.describe()
    # The rows of a stream that were not read yet may be longer.
    data = config.data.model_copy(update={"streaming": True, "max_length": 4096})
    streamed = set_up(config.model_copy(update={"data": data}))
    assert "rope_factors" not in streamed.describe()
    section = ModelConfig(path=str(folder), rope_factors="long")
    chosen = set_up(config.model_copy(update={"model": section}))
    assert chosen.model.config.longrope.choice == "long"
    assert "rope_factors" not in chosen.describe()
