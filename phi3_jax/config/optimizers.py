"""The optimizers of `training.optim`, and the settings of each, `training.optim_args`.

Names are those of transformers' `OptimizerNames` where it has one. This package has one state per
optimizer, float32: names that there mean another kernel or a compressed state are the same here.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from phi3_jax.config.schedules import Settings, setting_problems
from phi3_jax.config.yaml_text import parse_yaml


class Adafactor(Settings):
    """As in HF's `Trainer`: no relative step, not scaled by the parameter."""

    clip_threshold: float = Field(1.0, gt=0)
    decay_rate: float = Field(-0.8, lt=0)


class Ademamix(Settings):
    """A second momentum that forgets more slowly, times `alpha`; `t_*` are steps of warm-up."""

    beta3: float = Field(0.9999, ge=0, lt=1)
    alpha: float = Field(5.0, ge=0)
    t_alpha: int | None = Field(None, ge=1)
    t_beta3: int | None = Field(None, ge=1)


class Sgd(Settings):
    """torch's names."""

    momentum: float = Field(0.0, ge=0, lt=1)
    nesterov: bool = False


class Adagrad(Settings):
    """torch's names."""

    eps: float = Field(1e-10, gt=0)


class Rmsprop(Settings):
    """torch's names."""

    alpha: float = Field(0.99, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    centered: bool = False


class ScheduleFree(Settings):
    """The average weighs each step by its learning rate to this power."""

    weight_lr_power: float = Field(2.0, ge=0)


class Prodigy(Settings):
    """prodigyopt's names; `d0` is the first estimate of the rate."""

    beta3: float | None = Field(None, ge=0, lt=1)
    d0: float = Field(1e-6, gt=0)
    d_coef: float = Field(1.0, gt=0)
    safeguard_warmup: bool = False


class Muon(Settings):
    """torch's names."""

    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    ns_steps: int = Field(5, ge=1, le=20)


class LoraMuon(Settings):
    """The decay of the gradients' average."""

    momentum: float = Field(0.95, ge=0, lt=1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What is computed under one or more names.

    Attributes:
        settings: its `optim_args`.
        note: a line that is printed at the start of a run.
        loraplus: whether `loraplus_lr_ratio` can scale its updates.
        sweep: whether a sweep can scale its updates by each member's learning rate.
        whole: whether it looks at whole matrices, whose rank then matters.
    """

    settings: type[Settings]
    note: str = ""
    loraplus: bool = True
    sweep: bool = True
    whole: bool = False


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(Settings),
    "adafactor": Optimizer(Adafactor, whole=True),
    "lion": Optimizer(Settings),
    "ademamix": Optimizer(Ademamix),
    "sgd": Optimizer(Sgd),
    "adagrad": Optimizer(Adagrad),
    "rmsprop": Optimizer(Rmsprop),
    "schedule_free_adamw": Optimizer(ScheduleFree, loraplus=False, sweep=False),
    "schedule_free_sgd": Optimizer(ScheduleFree, loraplus=False, sweep=False),
    "schedule_free_radam": Optimizer(ScheduleFree, loraplus=False, sweep=False),
    "stable_adamw": Optimizer(Settings, whole=True),
    "prodigy": Optimizer(
        Prodigy,
        "prodigy: learning_rate is a factor on the rate that it finds, and usually 1",
        loraplus=False,
        sweep=False,
    ),
    "muon": Optimizer(Muon, whole=True),
    "lora_muon": Optimizer(LoraMuon, loraplus=False),
}
# transformers' names for the same computation.
NAMES: dict[str, str] = {
    **{name: name for name in OPTIMIZERS if name not in ("adamw", "lion")},
    **dict.fromkeys(
        (
            "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused",
            "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit",
            "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
            "adamw_hf", "adamw_apex_fused",  # until transformers 4
        ),
        "adamw",
    ),
    **dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), "lion"),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), "ademamix"),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), "rmsprop"),
}  # fmt: skip
_PLAIN = {"adamw_torch", "lion_32bit", *OPTIMIZERS}
_PROJECTS = "it projects the gradients of whole weights to a low rank, which those of A and B have"
_FUSED = "it updates whole weights during the backward pass, and those of LoRA are frozen"
_BY_ORDER = (
    "the momentum of its parameter number i is beta1 * 0.9**i, in the order of PyTorch's list, and "
    "here the layers of a stack have no such order"
)
# transformers' names that mean nothing here, and why.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw",
            "apollo_adamw_layerwise",
        ),
        _PROJECTS,
    ),
    **dict.fromkeys(("lomo", "adalomo"), _FUSED),
    "grokadamw": _BY_ORDER,
}  # fmt: skip


_SHORT = {"adam": "adamw_torch", "adamw": "adamw_torch", "lion": "lion_32bit"}


def name_problem(name: str) -> str | None:
    """What is wrong with a name of `training.optim`."""
    if name in NAMES:
        return None
    if name in REFUSED:
        return f"{name} cannot be used: {REFUSED[name]}; use adamw_torch"
    close = difflib.get_close_matches(name.lower(), NAMES, n=3, cutoff=0.6)
    close = [_SHORT[name.lower()]] if name.lower() in _SHORT else close
    known = [name for name in NAMES if name in _PLAIN]
    hint = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(known)}"
    return f"{name!r} is no optimizer; {hint}"


def optimizer_note(name: str) -> str | None:
    """The line that a run prints about its optimizer, if there is one to print."""
    kind = NAMES[name]
    if OPTIMIZERS[kind].note or name in _PLAIN:
        return OPTIMIZERS[kind].note or None
    return f"optimizer: {name} is {plain_name(kind)} here, with its state in float32"


def plain_name(kind: str) -> str:
    """The name of `training.optim` for what is computed."""
    return {"adamw": "adamw_torch", "lion": "lion_32bit"}.get(kind, kind)


def parse_args(text: str) -> dict[str, Any]:
    """HF's `key=value,key=value` as a mapping.

    Raises:
        ValueError: an item without `=`, or a value that is not valid YAML.
    """
    found: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{item!r} is not of the form key=value")
        found[key.strip()] = parse_yaml(value)
    return found


def args_problems(name: str, args: Mapping[str, object]) -> list[str]:
    """What is wrong with the `optim_args` of an optimizer, whose name is a known one."""
    return setting_problems(OPTIMIZERS[NAMES[name]].settings, name, args)
