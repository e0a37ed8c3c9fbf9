"""Checkpoints of small states, and damage to them."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
from flax import nnx

from phi3_jax.training import state_files
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.state_files import read_record
from phi3_jax.training.step import TrainState

IDENTITY = {
    "base": "b", "data": "d", "held_out": "h", "chooses_best": False,
    "rows": [2, 4, 1], "asked": {"attn": "auto"}, "choices": {"attn": "splash"},
    "planned": 4, "extend": None,
    "settings": {"training.seed": 1},
}  # fmt: skip


def state_of(value: float) -> TrainState:
    value = float(value)
    trainable = nnx.State({"lora_A": nnx.LoRAParam(jnp.full((2, 3), value))})
    return TrainState(trainable, {"mu": jnp.full((2, 3), -value)})


def saved(folder, *steps: int, limit: int | None = None, identity=IDENTITY) -> Checkpoints:
    """Checkpoints of these steps, each with a state of that value."""
    checkpoints = Checkpoints(folder, identity, limit)
    for step in steps:
        checkpoints.save(step, state_of(step), {})
    checkpoints.wait()
    return checkpoints


def scale_an_array(folder) -> None:
    """A sound Orbax checkpoint of other numbers: only the digests tell."""
    record = read_record(folder.parent, int(folder.name))
    wanted = {name: [((0, 2), (0, 3))] for name in record["arrays"]}
    found = state_files.read_blocks(folder.parent, record, wanted)
    changed = {name: 2 * jnp.asarray(*blocks.values()) for name, blocks in found.items()}
    part = state_files.start_part(folder.parent, 99, 0, changed)()
    shutil.rmtree(folder / "state")
    part.parent.rename(folder / "state")
    part.parent.parent.rmdir()


def change_record(folder, **values) -> None:
    file = folder / "run" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
