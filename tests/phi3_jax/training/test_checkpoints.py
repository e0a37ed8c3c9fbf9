"""Checkpoints: where a run starts, and that the folder is closed on every path."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from phi3_jax import UserError
from phi3_jax.training.checkpoints import open_checkpoints
from phi3_jax.training.step import TrainState

IDENTITY = {"base": "b", "data": "d", "settings": {"training.seed": 1}}


def state_of(value: float) -> TrainState:
    trainable = nnx.State({"lora_A": nnx.LoRAParam(jnp.full((2, 3), value))})
    return TrainState(trainable, {"mu": jnp.full((2, 3), -value)})


def test_new_runs_start_at_0_and_resumed_ones_at_the_last_checkpoint(tmp_path):
    fresh = state_of(0.0)
    with open_checkpoints(tmp_path, None, IDENTITY) as checkpoints:
        assert checkpoints.start(fresh, resume=False) == (0, fresh)
        for step in (2, 4):
            checkpoints.save(step, state_of(step), eval_loss=None)
        assert checkpoints.start(fresh, resume=False) == (0, fresh)
    with open_checkpoints(tmp_path, None, IDENTITY) as checkpoints:
        step, state = checkpoints.start(fresh, resume=True)
    assert step == 4
    np.testing.assert_array_equal(state.trainable["lora_A"][...], np.full((2, 3), 4.0))
    np.testing.assert_array_equal(state.opt_state["mu"], np.full((2, 3), -4.0))


def test_another_run_is_refused(tmp_path):
    with open_checkpoints(tmp_path, None, IDENTITY) as checkpoints:
        checkpoints.save(1, state_of(1.0), eval_loss=None)
    other = IDENTITY | {"base": "other", "settings": {"training.seed": 2}}
    with open_checkpoints(tmp_path, None, other) as checkpoints:
        checkpoints.start(state_of(0.0), resume=False)
        with pytest.raises(
            UserError, match=r"different base model; training.seed was 1 and is now"
        ):
            checkpoints.start(state_of(0.0), resume=True)


def test_the_best_is_kept_besides_the_last(tmp_path):
    with open_checkpoints(tmp_path, 1, IDENTITY) as checkpoints:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
            checkpoints.save(step, state_of(step), loss)
        assert checkpoints.latest() == 4 and checkpoints.best() == 2
    assert {p.name for p in tmp_path.iterdir() if p.name.isdigit()} == {"2", "4"}


def test_closed_after_an_error_in_the_middle(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(ocp.CheckpointManager, "close", lambda manager: closed.append(manager))
    with pytest.raises(RuntimeError), open_checkpoints(tmp_path, None, IDENTITY):
        raise RuntimeError
    assert len(closed) == 1
