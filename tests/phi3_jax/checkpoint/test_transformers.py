"""Adapters in transformers itself, which loads them with a loader of its own, without PEFT's."""

from __future__ import annotations

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

import lora_flax
import phi3_jax
from tests.conftest import SHAPES, forward, tiny_hf_model
from tests.phi3_jax.peft_models import shaken

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, about tied embeddings

TOKENS = np.arange(3, 15, dtype=np.int32)[None]
# The rows of the table in docs/pytorch.md.
CASES = {
    "slices": {"target_modules": ["q_proj", "up_proj"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "rank_pattern": {"target_modules": ["qkv_proj", "o_proj"], "rank_pattern": {"o_proj": 6}},
    "alpha_pattern": {"target_modules": ["qkv_proj", "o_proj"], "alpha_pattern": {"o_proj": 6}},
    "lora_bias": {"target_modules": ["o_proj"], "lora_bias": True},
    "modules": {"target_modules": ["o_proj"], "modules_to_save": ["model.norm", "lm_head"]},
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": [3, 5]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_hf_model(**SHAPES["gqa"], initializer_range=0.15).save_pretrained(folder)
    return folder


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_that_were_trained(base, case, tmp_path):
    model = phi3_jax.load(base)
    lora_flax.wrap(model, lora_flax.LoraConfig(r=2, lora_alpha=3, **CASES[case]))
    rng = np.random.default_rng(0)
    trained = nnx.state(model, lora_flax.mark_only_lora_as_trainable(model))
    shift = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), trained)
    nnx.update(model, shift)
    lora_flax.save_peft(model, tmp_path, base_model_name_or_path=str(base))
    loaded = phi3_jax.load(base)
    lora_flax.load_peft(loaded, tmp_path)  # without what randomness put into the padding
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(logits(theirs), forward(loaded, TOKENS), rtol=0, atol=2e-4)


def test_it_ignores_the_magnitudes_of_dora(base, tmp_path):
    """transformers 5.24 does so with PEFT's own file too; PEFT itself loads it right."""
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = shaken(model, config)
    adapted.save_pretrained(str(tmp_path))
    expected = logits(adapted)
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert abs(logits(own) - expected).max() > 0.1
    by_peft = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path))
    np.testing.assert_allclose(logits(by_peft), expected, rtol=0, atol=1e-5)
