"""What to adapt and how: `LoraConfig`, with the field names and meanings of PEFT's."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from lora_flax.errors import LoraError

Bias = Literal["none", "all", "lora_only"]
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation of chosen dense layers (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        r: rank of the update.
        lora_alpha: the update is scaled by `lora_alpha / r`.
        lora_dropout: share of the update's inputs set to zero, in [0, 1), when a layer is called
            with a key: `layer(x, key=key)`. A call without one drops nothing.
        target_modules: which layers. A collection holds names or dotted endings of names
            (`"qkv_proj"`, `"mlp.down_proj"`); a string is a regular expression that must match the
            whole name; `"all-linear"` is every dense layer but the output head `lm_head`.
            A stack of n layers has the names `layers.0.qkv_proj` to `layers.{n-1}.qkv_proj`, as in
            PEFT. None is refused by `wrap`, which lists the names there are.
        use_rslora: scale by `lora_alpha / sqrt(r)` (Kalajdzievski 2023, arXiv:2312.03732).
        bias: which biases train besides A and B: none, all of the model, or those of wrapped
            layers (`"lora_only"`).

    Raises:
        LoraError: naming every field whose value cannot be used.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Collection[str] | None = None
    use_rslora: bool = False
    bias: Bias = "none"

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            problems.append(f"r must be an integer of at least 1, not {self.r!r}")
        if not _is_number(self.lora_alpha) or not 0 < self.lora_alpha < math.inf:
            problems.append(f"lora_alpha must be a number above 0, not {self.lora_alpha!r}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout must be a number in [0, 1), not {self.lora_dropout!r}")
        if not isinstance(self.use_rslora, bool):
            problems.append(f"use_rslora must be true or false, not {self.use_rslora!r}")
        if self.bias not in get_args(Bias):
            problems.append(f"bias must be none, all or lora_only, not {self.bias!r}")
        targets = self.target_modules
        if targets is not None and not isinstance(targets, str):
            names = targets if isinstance(targets, Collection) else ()
            if not names or not all(isinstance(name, str) and name for name in names):
                problems.append(
                    "target_modules must be a list of names, a regular expression or "
                    f"{ALL_LINEAR!r}, not {targets!r}"
                )
            else:
                # Static data of a module must hash, and a set has no order of its own.
                object.__setattr__(self, "target_modules", tuple(sorted(set(names))))
        if problems:
            raise LoraError("; ".join(problems))

    @property
    def scaling(self) -> float:
        """The factor on `B A x`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
