"""The best checkpoint: that it is kept, which one it is, and what becomes of a damaged one."""

from __future__ import annotations

import math

import pytest

from phi3_jax import UserError
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.state_files import read_record, saved_steps
from phi3_jax.training.strategies import Best
from tests.phi3_jax.training.saved import IDENTITY, change_record, saved, scale_an_array, state_of


def test_the_best_is_kept_besides_the_last(tmp_path):
    checkpoints = saved(tmp_path, limit=1)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
        checkpoints.save(step, state_of(step), {"eval_loss": loss})
    assert checkpoints.latest() == 4 and checkpoints.best() == 2
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}
    greatest = Checkpoints(tmp_path, IDENTITY, 1, best=Best("eval_loss", greater=True))
    assert greatest.best() == 4


def with_losses(folder, *losses: float, **record) -> Checkpoints:
    """Checkpoints of steps 1, 2, ... that were evaluated."""
    checkpoints = saved(folder, identity=IDENTITY | record)
    for step, loss in enumerate(losses, start=1):
        checkpoints.save(step, state_of(step), {"eval_loss": loss})
    checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize(
    "damage", [scale_an_array, lambda folder: change_record(folder, metrics={})]
)
def test_a_damaged_best_checkpoint_is_put_aside_on_request(tmp_path, capsys, damage):
    """And then the best of the others is exported."""
    checkpoints = with_losses(tmp_path, 2.0, 1.0, 3.0)
    damage(tmp_path / "2")
    with pytest.raises(UserError, match=rf"{tmp_path}/2: damaged, .*pass --resume=auto to put"):
        checkpoints.restore_best(state_of(0.0), fall_back=False)
    assert saved_steps(tmp_path) == [1, 2, 3]
    step, state = checkpoints.restore_best(state_of(0.0), fall_back=True)
    assert step == 1 and state.opt_state["mu"][0, 0] == -1
    assert f"warning: {tmp_path}/2: damaged" in capsys.readouterr().err
    assert (tmp_path / "2.damaged").is_dir()
    for step in (1, 3):
        damage(tmp_path / str(step))
    assert checkpoints.restore_best(state_of(0.0), fall_back=True) is None


def test_losses_on_other_held_out_rows_are_not_compared(tmp_path):
    with_losses(tmp_path, 0.1, held_out="before")
    checkpoints = saved(tmp_path, identity=IDENTITY | {"chooses_best": True})
    for step, loss in ((2, 1.0), (3, 2.0)):
        checkpoints.save(step, state_of(step), {"eval_loss": loss})
    step, _ = checkpoints.restore_best(state_of(0.0), fall_back=False)
    assert step == 2


def test_where_a_run_ended_before_it_was_extended_is_never_the_best(tmp_path):
    """A run of that length from the start does not save that step."""
    checkpoints = with_losses(tmp_path, 3.0, 2.0)
    checkpoints.save(3, state_of(3.0), {"eval_loss": 1.0}, due=False)
    assert checkpoints.best() == 3
    checkpoints.save(4, state_of(4.0), {"eval_loss": 2.5})
    assert checkpoints.best() == 2


def test_metrics_are_added_once(tmp_path):
    checkpoints = saved(tmp_path, 1)
    assert checkpoints.best() is None
    for loss in (2.5, 1.0):
        checkpoints.save(1, state_of(7.0), {"eval_loss": loss, "eval_perplexity": math.inf})
    checkpoints.wait()
    assert read_record(tmp_path, 1)["metrics"] == {"eval_loss": 2.5}
    assert checkpoints.start(state_of(0.0), True, False)[1].opt_state["mu"][0, 0] == -1
