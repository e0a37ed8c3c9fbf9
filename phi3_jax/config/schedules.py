"""The settings of each learning-rate schedule, `training.lr_scheduler_kwargs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from phi3_jax.config.sections import Section

Shape = Literal["linear", "cosine", "1-sqrt"]


class Settings(Section):
    """Names and defaults are those of transformers' schedules; this base class has none."""


class Cosine(Settings):
    """`num_cycles` waves; half of one falls from the peak to 0."""

    num_cycles: float = Field(0.5, gt=0)


class CosineWithRestarts(Settings):
    """`num_cycles` falls from the peak to 0."""

    num_cycles: float = Field(1, gt=0)


class CosineWithMinLr(Cosine):
    """Falls to `min_lr`, or to `min_lr_rate` times the peak."""

    min_lr: float | None = Field(None, ge=0)
    min_lr_rate: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_of_both(self) -> CosineWithMinLr:
        if (self.min_lr is None) == (self.min_lr_rate is None):
            raise ValueError("exactly one of min_lr and min_lr_rate is needed")
        return self


class Polynomial(Settings):
    """Falls to `lr_end`."""

    lr_end: float = Field(1e-7, ge=0)
    power: float = Field(1.0, gt=0)


class InverseSqrt(Settings):
    """`timescale` defaults to the warm-up, or 10,000 without one."""

    timescale: float | None = Field(None, gt=0)


class WarmupStableDecay(Settings):
    """A plateau of `num_stable_steps` (by default all that is left) before the decay."""

    num_decay_steps: int = Field(ge=1)
    num_stable_steps: int | None = Field(None, ge=0)
    warmup_type: Shape = "linear"
    decay_type: Shape = "cosine"
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    num_cycles: float = Field(0.5, gt=0)


ScheduleName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "constant",
    "constant_with_warmup",
]
SCHEDULES: dict[ScheduleName, type[Settings]] = {
    "linear": Settings,
    "cosine": Cosine,
    "cosine_with_restarts": CosineWithRestarts,
    "cosine_with_min_lr": CosineWithMinLr,
    "polynomial": Polynomial,
    "inverse_sqrt": InverseSqrt,
    "warmup_stable_decay": WarmupStableDecay,
    "constant": Settings,
    "constant_with_warmup": Settings,
}


def setting_problems(kind: type[Settings], name: str, settings: Mapping[str, object]) -> list[str]:
    """What is wrong with the settings of what `name` stands for."""
    known = kind.model_fields
    try:
        kind.model_validate(settings)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else name
            if item["type"] == "extra_forbidden":
                has = f"it has {', '.join(known)}" if known else "it has none"
                problems.append(f"{key} is no setting of {name}; {has}")
            else:
                problems.append(f"{key}: {item['msg'].removeprefix('Value error, ')}")
        return problems
    return []


def schedule_problems(name: ScheduleName, settings: Mapping[str, object], peak: float) -> list[str]:
    """What is wrong with the settings of a schedule whose peak rate is `peak`."""
    if problems := setting_problems(SCHEDULES[name], name, settings):
        return problems
    parsed = SCHEDULES[name].model_validate(settings)
    for key in ("lr_end", "min_lr"):
        end = getattr(parsed, key, None)
        if end is not None and end > peak:
            return [f"{key} {end} is above learning_rate {peak}"]
    return []
