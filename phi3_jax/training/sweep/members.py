"""The members of a sweep, each with the config of the run that it would be alone."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from phi3_jax.buckets import scheme_of
from phi3_jax.config.loader import RunConfig

_SECTION = {"learning_rate": "training", "seed": "training", "lora_alpha": "peft", "r": "peft"}


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep: its name, such as `learning_rate=0.0001,r=8`, and its config."""

    name: str
    config: RunConfig


def sweep_members(config: RunConfig) -> list[Member]:
    """Every combination of the lists, in order, with the last list varying fastest.

    A member has its device or devices for itself: alone it is the same run with `mesh.data` 1.
    """
    lists = config.sweep.values
    mesh = config.mesh
    if mesh.sizes is not None:
        mesh = mesh.model_copy(update={"data": 1})
    members = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        update: dict[str, Any] = {"sweep": type(config.sweep)(), "mesh": mesh}
        for section in ("training", "peft"):
            own = {k: v for k, v in chosen.items() if _SECTION[k] == section}
            update[section] = getattr(config, section).model_copy(update=own)
        name = ",".join(f"{key}={_text(value)}" for key, value in chosen.items())
        directory = config.training.output_dir
        named = {"output_dir": str(Path(directory) / name)}
        if scheme_of(directory):  # whose two slashes a path would lose
            named["output_dir"] = f"{directory.rstrip('/')}/{name}"
        if config.training.run_name is not None:
            named["run_name"] = f"{config.training.run_name}-{name}"
        update["training"] = update["training"].model_copy(update=named)
        members.append(Member(name, config.model_copy(update=update)))
    return members


def _text(value: float) -> str:
    """A short text that no other number has."""
    short = f"{value:g}"  # six digits
    return short if float(short) == value else str(value)
