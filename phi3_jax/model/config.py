"""`Phi3Config`: everything a `model_type: phi3` config.json can specify, validated once.

Both spellings of the rotary settings are supported:

- before transformers 5: `rope_theta`, `partial_rotary_factor` and `rope_scaling` at the top level
  (with `type: su` in the first releases of Phi-3-mini-128k);
- from transformers 5 on: one `rope_parameters` dictionary.

Anything this network cannot compute is an error here, never a warning later.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from phi3_jax.errors import UserError
from phi3_jax.model.checks import FIELD_RULES, is_positive, is_size, refuse_unsupported, shown

# transformers renames both to longrope for Phi-3 (configuration_phi3.py).
LONGROPE_NAMES = ("longrope", "su", "yarn")


RopeFactors = Literal["by_text", "by_batch", "short", "long"]


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE's rescaling of the rotary frequencies (Ding et al. 2024, arXiv:2402.13753).

    Attributes:
        short_factor: divisors of the `rotary_dim // 2` frequencies, up to the original length.
        long_factor: divisors for sequences longer than that.
        attention_factor: multiplier of cos and sin in both regimes.
        choice: how each call chooses between the two. `by_text`: each text by its own length;
            `by_batch`: all rows by the largest position, as transformers does; `short` and `long`:
            always these, as servers do by the size of their context. Not part of config.json.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float
    choice: RopeFactors = "by_text"


@dataclasses.dataclass(frozen=True)
class Phi3Config:
    """Shape and constants of a Phi-3 network. Field names are Hugging Face's.

    Raises:
        UserError: inconsistent values; one message lists all of them.
    """

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 96
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    longrope: LongRope | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 32000
    pad_token_id: int | None = 32000

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {wanted}, not {shown(getattr(self, name))}"
            for names, holds, wanted in FIELD_RULES
            for name in names.split()
            if not holds(getattr(self, name))
        ]
        if not problems:
            problems = self._contradictions()
        if problems:
            raise UserError("invalid Phi-3 config: " + "; ".join(problems))

    def _contradictions(self) -> list[str]:
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.partial_rotary_factor > 1.0:
            problems.append(f"partial_rotary_factor {self.partial_rotary_factor} is not in (0, 1]")
        elif self.rotary_dim % 2 or not self.rotary_dim:
            problems.append(
                f"head_dim {self.head_dim} x partial_rotary_factor {self.partial_rotary_factor} "
                f"gives {self.rotary_dim} rotary dimensions; an even number is needed"
            )
        if self.longrope is not None:
            for name in ("short_factor", "long_factor"):
                length = len(getattr(self.longrope, name))
                if length != self.rotary_dim // 2:
                    problems.append(
                        f"rope_scaling.{name} has {length} values; {self.rotary_dim // 2} are "
                        f"needed (half of the {self.rotary_dim} rotary dimensions)"
                    )
        return problems

    @property
    def rotary_dim(self) -> int:
        """Number of leading dimensions of each head that are rotated; the rest pass through."""
        return int(self.head_dim * self.partial_rotary_factor)

    def with_rope_factors(self, choice: RopeFactors) -> Phi3Config:
        """The same network with LongRoPE's factors chosen that way; see `LongRope.choice`."""
        if self.longrope is None:
            return self
        return dataclasses.replace(self, longrope=dataclasses.replace(self.longrope, choice=choice))

    @property
    def q_size(self) -> int:
        """Columns of `qkv_proj` that belong to the queries."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of `qkv_proj` that belong to the keys; the values have the same number."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def from_file(cls, path: str | Path) -> Phi3Config:
        """Read a config.json. Raises UserError naming the file if it cannot be read."""
        return cls.from_hf(read_json_object(Path(path)), Path(path))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], file: Path | None = None) -> Phi3Config:
        """Build from the dictionary of an HF config.json, in the old or new spelling.

        Args:
            raw: the dictionary.
            file: where it was read, to be named in the error.

        Raises:
            UserError: another architecture; a rope type, activation, bias, dropout or
                quantization that this network does not support; inconsistent values.
        """
        try:
            return cls._from_hf(raw)
        except UserError as error:
            raise UserError(f"{file}: {error}" if file else str(error)) from None

    @classmethod
    def _from_hf(cls, raw: Mapping[str, Any]) -> Phi3Config:
        refuse_unsupported(raw)
        heads = raw.get("num_attention_heads", cls.num_attention_heads)
        hidden = raw.get("hidden_size", cls.hidden_size)
        if not (is_size(heads) and is_size(hidden)):
            raise UserError(
                f"hidden_size {shown(hidden)} and num_attention_heads {shown(heads)} must be "
                "positive integers"
            )
        rope = _rope_parameters(raw)
        eos = raw.get("eos_token_id", cls.eos_token_id)
        values = {
            field.name: raw[field.name]
            for field in dataclasses.fields(cls)
            if raw.get(field.name) is not None
        }
        # null means "disabled" for these, and "the default" for every other key.
        for name in ("sliding_window", "bos_token_id", "pad_token_id"):
            values[name] = raw.get(name, getattr(cls, name))
        values |= {
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
            "num_key_value_heads": _or(raw.get("num_key_value_heads"), heads),
            "head_dim": _or(raw.get("head_dim"), hidden // heads),
        }
        for name in ("rope_theta", "partial_rotary_factor"):
            value = _or(rope.get(name), getattr(cls, name))
            values[name] = float(value) if is_positive(value) else value  # refused below
        values.pop("longrope", None)
        if "original_max_position_embeddings" not in values:
            nested = rope.get("original_max_position_embeddings")
            values["original_max_position_embeddings"] = _or(
                nested, cls.original_max_position_embeddings
            )
        config = cls(**values)
        return dataclasses.replace(config, longrope=_longrope(rope, config))

    def to_hf(self) -> dict[str, Any]:
        """The config.json for transformers, in the spelling that 4.x and 5.x share."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "longrope"
        }
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        scaling: dict[str, Any] | None = None
        if self.longrope is not None:
            scaling = {
                "type": "longrope",
                "short_factor": list(self.longrope.short_factor),
                "long_factor": list(self.longrope.long_factor),
            }
            if not math.isclose(self.longrope.attention_factor, _attention_factor({}, self)):
                scaling["attention_factor"] = self.longrope.attention_factor
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "use_cache": True,
            "rope_scaling": scaling,
            **fields,
        }


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder, such as config.json.

    Raises:
        UserError: no such file, or its content is not a JSON object.
    """
    if os.path.exists(path) and not path.is_file():  # a FIFO would never end
        raise UserError(f"{path}: not a regular file")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} there; is it a model folder?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except RecursionError:
        raise UserError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:  # also bytes that are not UTF-8, and integers of 4,300 digits
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, not a {type(raw).__name__}")
    return raw


def _or(value: Any, default: Any) -> Any:
    """A value, or what null stands for; 0 is a value, which the rules then refuse."""
    return default if value is None else value


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Merge both spellings into one dictionary; `rope_scaling` wins, as in transformers."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), Mapping | None):
            raise UserError(f"{name} must be an object, not {shown(raw[name])}")
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is None:
            rope[name] = raw.get(name)
    rope["rope_type"] = _or(_or(rope.get("rope_type"), rope.get("type")), "default")
    if rope["rope_type"] not in ("default", *LONGROPE_NAMES):
        raise UserError(
            f"rope type {shown(rope['rope_type'])} is unknown to Phi-3; known: default, longrope"
        )
    return rope


def _longrope(rope: Mapping[str, Any], config: Phi3Config) -> LongRope | None:
    if rope["rope_type"] == "default":
        return None
    factors = {}
    for name in ("short_factor", "long_factor"):
        value = rope.get(name)
        if not isinstance(value, list) or not all(map(is_positive, value)):
            raise UserError(f"rope_scaling.{name} must be a list of positive numbers")
        factors[name] = tuple(float(x) for x in value)
    return LongRope(
        factors["short_factor"], factors["long_factor"], _attention_factor(rope, config)
    )


def _attention_factor(rope: Mapping[str, Any], config: Phi3Config) -> float:
    """sqrt(1 + ln(stretch) / ln(original length)), unless the config specifies a value.

    Matches transformers' `_compute_longrope_parameters`: 1.1902 for 131072 over 4096.
    """
    for name in ("attention_factor", "factor"):
        if rope.get(name) is not None and not is_positive(rope[name]):
            raise UserError(
                f"rope_scaling.{name} must be a positive number, not {shown(rope[name])}"
            )
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = config.original_max_position_embeddings
    if original == 1:
        raise UserError("original_max_position_embeddings must be above 1 for longrope")
    stretch = _or(rope.get("factor"), config.max_position_embeddings / original)
    if stretch <= 1.0:
        return 1.0
    return math.sqrt(1.0 + math.log(stretch) / math.log(original))
