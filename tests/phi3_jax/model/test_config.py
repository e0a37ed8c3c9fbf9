"""Phi3Config reads what transformers reads, and refuses what the network cannot compute."""

from __future__ import annotations

import copy
import json
import math
import os

import pytest
import transformers

from phi3_jax import Phi3Config, UserError

# Verbatim values of microsoft/Phi-3-mini-4k-instruct and -128k-instruct (factors shortened to the
# values of a narrow head), and of Phi-4-mini-instruct.
MINI_4K = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
MINI_128K = MINI_4K | {
    "max_position_embeddings": 131072,
    "sliding_window": 262144,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0 + 0.01 * i for i in range(48)],
        "long_factor": [1.0 + i for i in range(48)],
    },
}
PHI4_MINI = MINI_4K | {
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 200064,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "sliding_window": 262144,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 48,
        "long_factor": [1.0 + i for i in range(48)],
    },
}


def as_transformers(raw: dict) -> transformers.Phi3Config:
    """transformers 5.23 fails on the name `su` itself: it fills in what longrope needs by name."""
    raw = copy.deepcopy(raw)  # it changes what it is given
    if raw["rope_scaling"]:
        raw["rope_scaling"]["type"] = "longrope"
    return transformers.Phi3Config(**raw)


def test_mini_4k():
    config = Phi3Config.from_hf(MINI_4K)
    assert (config.head_dim, config.rotary_dim, config.sliding_window) == (96, 96, 2047)
    assert config.longrope is None


def test_attention_factor_is_published_value():
    config = Phi3Config.from_hf(MINI_128K)
    assert config.longrope is not None
    assert math.isclose(config.longrope.attention_factor, 1.1902380714238083)


def test_partial_rotary_counts_from_head_dim():
    config = Phi3Config.from_hf(PHI4_MINI)
    assert (config.head_dim, config.rotary_dim) == (128, 96)
    assert config.tie_word_embeddings


@pytest.mark.parametrize("raw", [MINI_4K, MINI_128K, PHI4_MINI], ids=["4k", "128k", "phi4-mini"])
def test_old_and_new_spelling_are_one(raw):
    """transformers 5 writes `rope_parameters`; both spellings must give one config."""
    new = json.loads(as_transformers(raw).to_json_string())
    assert "rope_parameters" in new and "rope_theta" not in new
    assert Phi3Config.from_hf(new) == Phi3Config.from_hf(raw)


@pytest.mark.parametrize("raw", [MINI_4K, MINI_128K, PHI4_MINI], ids=["4k", "128k", "phi4-mini"])
def test_round_trip_and_transformers_reads_it(raw):
    config = Phi3Config.from_hf(raw)
    written = config.to_hf()
    assert Phi3Config.from_hf(written) == config
    theirs, ours = as_transformers(raw), as_transformers(written)
    assert ours.rope_parameters["rope_type"] == theirs.rope_parameters["rope_type"]
    for name in ("rope_theta", "partial_rotary_factor", "short_factor", "long_factor"):
        assert ours.rope_parameters.get(name) == theirs.rope_parameters.get(name)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == theirs.sliding_window


def test_explicit_attention_factor_survives():
    raw = MINI_128K | {"rope_scaling": MINI_128K["rope_scaling"] | {"attention_factor": 1.5}}
    config = Phi3Config.from_hf(raw)
    assert config.longrope is not None and config.longrope.attention_factor == 1.5
    assert Phi3Config.from_hf(config.to_hf()) == config


def longrope(**change) -> dict:
    return {
        "rope_scaling": MINI_128K["rope_scaling"] | change,
        "max_position_embeddings": 131072,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear' is unknown"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"resid_pdrop": 0.1}, "resid_pdrop 0.1"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"model_type": "phimoe"}, "Phi-3.5-MoE"),
        ({"model_type": "phi3small"}, "Phi-3-small"),
        ({"model_type": "llama"}, "'llama' is not a Phi-3 network"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1 values; 48 are needed",
        ),
        (
            {"rope_scaling": {"type": "su", "short_factor": "x", "long_factor": [1.0]}},
            "short_factor must be a list of positive numbers",
        ),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number .*, not '1e-5'"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number .*, not nan"),
        ({"rope_theta": "abc"}, "rope_theta must be a positive number .*, not 'abc'"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number .*, not -1.0"),
        ({"rope_theta": math.inf}, "rope_theta must be a positive number .*, not inf"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number that float32 can hold"),
        ({"rope_theta": 1e-50}, "rope_theta must be a positive number that float32 can hold"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps must be a positive number that float32 can hold"),
        ({"initializer_range": 10**400}, "initializer_range must be a number of at least 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be .* up to 10,000"),
        ({"head_dim": 0}, "head_dim must be a positive integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive integer"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings must be"),
        ({"rope_scaling": []}, r"rope_scaling must be an object, not \[\]"),
        ({"rope_parameters": 0}, "rope_parameters must be an object, not 0"),
        ({"rope_scaling": {"type": ""}}, "rope type '' is unknown"),
        (longrope(short_factor=[10**400] * 48), "short_factor must be a list of positive"),
        (longrope(attention_factor=10**400), "attention_factor must be a positive number"),
        (longrope(factor=0), "factor must be a positive number"),
        ({"quantization_config": []}, "quantization_config"),
        ({"partial_rotary_factor": [1]}, r"partial_rotary_factor must be .*, not \[1\]"),
        ({"hidden_size": "3072"}, "hidden_size '3072'"),
        ({"hidden_size": True}, "hidden_size True"),
        ({"vocab_size": 10**30}, r"vocab_size must be a positive integer below 2\*\*31"),
        ({"vocab_size": 32064.0}, "vocab_size must be a positive integer"),
        ({"head_dim": "96"}, "head_dim must be a positive integer"),
        ({"max_position_embeddings": math.nan}, "max_position_embeddings must be"),
        ({"initializer_range": "x"}, "initializer_range must be a number of at least 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "2"}, "eos_token_id must be null or token ids"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id must be null or token ids"),
        ({"eos_token_id": [[1]]}, "eos_token_id must be null or token ids"),
        ({"pad_token_id": 1.5}, "pad_token_id must be null or token ids"),
        ({"sliding_window": "2047"}, "sliding_window must be null or a positive integer"),
        ({"rope_scaling": "su"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": ["su"]}}, "rope type"),
        ({"rope_scaling": {"type": {}, "rope_type": 5}}, "rope type 5"),
        ({"quantization_config": [4]}, "quantization_config"),
        ({"model_type": ["phi3"]}, "model_type"),
        ({"architectures": 5, "model_type": None}, "model_type None"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        (longrope(attention_factor="1"), "attention_factor must be a positive number"),
        (longrope(factor=math.nan), "factor must be a positive number"),
        (longrope(short_factor=[math.nan] * 48), "short_factor must be a list of positive"),
        (longrope() | {"original_max_position_embeddings": 1}, "must be above 1 for longrope"),
    ],
)
def test_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        Phi3Config.from_hf(MINI_4K | change)


def test_file_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match="no config.json there"):
        Phi3Config.from_file(tmp_path / "config.json")
    for text in (b"{", b"\xff{}", b'{"a": ' * 200_000, b'{"a": ' + b"9" * 5000 + b"}"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
            Phi3Config.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="not a regular file"):
        Phi3Config.from_file(tmp_path / "config.json")
