"""What the card of an adapter says about the programs that read it."""

from __future__ import annotations

import pytest
from flax import nnx

import lora_flax
from phi3_jax.checkpoint.readers import merge_first, readers
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3

CONFIG = Phi3Config(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
    original_max_position_embeddings=32,
)  # fmt: skip


def written(**fields) -> dict:
    model = Phi3(CONFIG, rngs=nnx.Rngs(0))
    lora_flax.wrap(model, lora_flax.LoraConfig(**fields))
    return lora_flax.to_peft(model).config


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "up_proj"]])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_one_scale_is_read_by_all(targets, use_rslora):
    config = written(r=4, target_modules=targets, use_rslora=use_rslora)
    assert merge_first(config) is None
    assert readers(config)["vLLM"] == "`--enable-lora --max-lora-rank 8`"
    for name in ("PEFT", "transformers", "SGLang", "llama.cpp and Ollama"):
        assert "merge" not in readers(config)[name]


def test_llama_cpps_own_converter_ignores_scales():
    """The adapter that `phi3-jax export` makes has them in B."""
    config = written(r=4, target_modules="all-linear", alpha_pattern={"o_proj": 2})
    assert "own converter ignores alpha_pattern" in readers(config)["llama.cpp and Ollama"]


def test_vllm_accepts_certain_ranks_only():
    config = written(r=4, target_modules="all-linear")
    assert readers(config | {"r": 48})["vLLM"].endswith("--max-lora-rank 64`")
    assert readers(config | {"r": 48})["SGLang"].endswith("--max-lora-rank 48`")
    assert "merge first" in readers(config | {"r": 513})["vLLM"]


@pytest.mark.parametrize(
    ("fields", "not_by"),
    [
        ({"rank_pattern": {"o_proj": 2}}, {"vLLM", "SGLang"}),
        ({"alpha_pattern": {"o_proj": 2}}, {"vLLM", "SGLang"}),
        ({"use_dora": True}, {"transformers", "vLLM", "SGLang", "llama.cpp"}),
        ({"lora_bias": True}, {"vLLM", "SGLang", "llama.cpp"}),
        ({"modules_to_save": ["lm_head"]}, {"vLLM", "SGLang", "llama.cpp"}),
        ({"trainable_token_indices": [3]}, {"vLLM", "SGLang", "llama.cpp"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # a set has no fixed order
)
def test_what_only_peft_reads_is_named(fields, not_by):
    config = written(r=4, target_modules=["qkv_proj", "o_proj"], **fields)
    line = merge_first(config)
    assert line is not None
    programs = ("transformers", "vLLM", "SGLang", "llama.cpp")
    assert {name for name in programs if f"{name} (" in line} == not_by
    assert next(iter(fields)) in line
