"""What the values of a config.json may be, and which networks are refused by name."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import numpy as np

from phi3_jax.errors import UserError

OTHER_ARCHITECTURES = {
    "phi": "Phi-1, Phi-1.5 and Phi-2",
    "phi3small": "Phi-3-small (block-sparse attention)",
    "phimoe": "Phi-3.5-MoE",
    "phi3_v": "Phi-3-vision and Phi-3.5-vision",
    "phi4mm": "Phi-4-multimodal",
    "phi4_multimodal": "Phi-4-multimodal",
    "phi4flash": "Phi-4-mini-flash (Mamba and differential attention)",
}

MAX_LAYERS = 10_000
# The network computes in float32.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

shown = reprlib.repr  # for messages: cut if it is long


def is_size(value: object) -> TypeGuard[int]:
    """Whether it is an integer that an axis can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def is_depth(value: object) -> bool:
    """Whether it is a number of layers: the tensors of each one are listed by name."""
    return is_size(value) and value <= MAX_LAYERS


def is_positive(value: object) -> TypeGuard[float]:
    """Whether it is a number above 0 that stays so, and finite, in float32."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return _SMALLEST <= value <= _LARGEST


def is_tokens(value: object) -> bool:
    """Whether it is null, a token id, or several; some configs say -1 for none."""
    tokens = value if isinstance(value, tuple) else () if value is None else (value,)
    return all(type(token) is int and -1 <= token < 2**31 for token in tokens)


# What each field must be: the fields, the test, and its words.
FIELD_RULES: list[tuple[str, Callable[[object], bool], str]] = [
    (
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings original_max_position_embeddings",
        is_size,
        "a positive integer below 2**31",
    ),
    ("num_hidden_layers", is_depth, f"a positive integer up to {MAX_LAYERS:,}"),
    (
        "rms_norm_eps rope_theta partial_rotary_factor",
        is_positive,
        "a positive number that float32 can hold",
    ),
    ("initializer_range", lambda v: v == 0 or is_positive(v), "a number of at least 0"),
    ("sliding_window", lambda v: v is None or is_size(v), "null or a positive integer"),
    ("tie_word_embeddings", lambda v: isinstance(v, bool), "true or false"),
    ("bos_token_id eos_token_id pad_token_id", is_tokens, "null or token ids"),
]


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Raise UserError for another architecture, or one with operations that are missing here."""
    model_type = raw.get("model_type")
    if model_type != "phi3" or "Phi3SmallForCausalLM" in str(raw.get("architectures")):
        known = OTHER_ARCHITECTURES.get(str(model_type).lower())
        what = f"{known}, another architecture" if known else "not a Phi-3 network"
        raise UserError(
            f"model_type {shown(model_type)} is {what}; this program handles model_type 'phi3' "
            "(Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4, Phi-4-mini)"
        )
    problems = []
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act {shown(raw['hidden_act'])} (only silu)")
    problems += [f"{name} true" for name in ("attention_bias", "mlp_bias") if raw.get(name)]
    problems += [
        f"{name} {shown(raw[name])}"
        for name in ("attention_dropout", "resid_pdrop", "embd_pdrop")
        if raw.get(name)
    ]
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, Mapping | None):
        problems.append(f"quantization_config {shown(quantization)} (an object is expected)")
    elif quantization and not quantization.get("load_in_4bit"):
        method = quantization.get("quant_method", "of an unknown method")
        problems.append(f"quantization_config: {method} (only bitsandbytes' 4 bits)")
    if problems:
        raise UserError("not supported: " + "; ".join(problems))
