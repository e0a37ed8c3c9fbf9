"""The training loop: what is done after which step, and in which order."""

from __future__ import annotations

import os
import signal

import pytest

from phi3_jax.advice.clock import StepClock
from phi3_jax.config.training import TrainingConfig
from phi3_jax.training.interrupt import Interrupted, collect_signals
from phi3_jax.training.progress import Fetched, InProgress, take_steps
from phi3_jax.training.strategies import Strategies


class NoCheckpoints:
    def wait(self): ...


class Recorded(InProgress):
    """Notes what is called; its steps do nothing."""

    def fetch(self):
        self.calls.append(f"fetch {self.step + 1}")
        return Fetched([], None)

    def take_step(self, placed):
        self.calls.append(f"take {self.step + 1}")
        if self.step + 1 == self.killed_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return None, None

    def read(self, flight):
        self.calls.append(f"read {flight.step}")

    def log(self, flight):
        self.logged.append(flight.step)

    def evaluate(self):
        self.calls.append(f"evaluate {self.step}")
        self.evaluations[0][self.step] = {"eval_loss": self.losses.get(self.step, 1.0)}

    def save(self):
        self.calls.append(f"save {self.step}")
        self.due = self.is_save_due()

    def push(self):
        self.pushed.append(self.step)

    def loss_sums(self, weights, batch): ...

    def log_evaluation(self, records): ...


class Printed(list):
    print = list.append


def recorded(total_steps: int, step: int = 0, killed_at: int = 0, **training) -> Recorded:
    config = TrainingConfig(output_dir="x", **training)
    run = Recorded(
        config=config, plan=None, held_out=None, when=Strategies.of(config, total_steps, 3),
        total_steps=total_steps, checkpoints=NoCheckpoints(),
        terminal=Printed(), writers=[], evaluations=[{}], state=None, step=step, received=[],
        clock=StepClock(1.0),
    )  # fmt: skip
    run.calls, run.killed_at, run.losses = [], killed_at, {}
    run.logged, run.pushed = [], []
    return run


def test_metrics_are_read_while_the_next_step_runs():
    run = recorded(3)
    take_steps(run)
    assert run.calls == [
        "fetch 1", "take 1", "fetch 2", "take 2", "fetch 3", "read 1", "take 3", "read 2", "read 3",
        "evaluate 3",
    ]  # fmt: skip


def test_all_steps_are_read_and_evaluated_before_a_checkpoint():
    run = recorded(4, eval_steps=2, save_steps=2)
    take_steps(run)
    calls = [call for call in run.calls if not call.startswith("fetch")]
    half = ["take 1", "take 2", "read 1", "read 2", "evaluate 2", "save 2"]
    assert calls[: len(half)] == half
    assert calls[-3:] == ["read 4", "evaluate 4", "save 4"]


def test_a_signal_saves_the_step_that_runs():
    run = recorded(9, killed_at=2)
    with collect_signals() as run.received:
        with pytest.raises(Interrupted, match="after step 2") as caught:
            take_steps(run)
    assert caught.value.signum == signal.SIGTERM
    assert run.calls[-3:] == ["read 1", "read 2", "save 2"]


def test_a_step_saved_without_its_evaluation_gets_it_on_resume():
    run = recorded(4, step=2, eval_steps=2)
    take_steps(run)
    assert run.calls[:3] == ["evaluate 2", "save 2", "fetch 3"]


def test_a_checkpoint_that_a_signal_kept_from_the_hub_is_pushed_on_resume():
    run = recorded(9, killed_at=4, save_steps=2)
    with collect_signals() as run.received, pytest.raises(Interrupted):
        take_steps(run)
    assert run.pushed == [2]
    again = recorded(9, step=4, save_steps=2)
    take_steps(again)
    assert again.pushed == [4, 6, 8]
    again = recorded(9, step=5, save_steps=2)  # a signal alone saved it
    take_steps(again)
    assert again.pushed == [6, 8]


@pytest.mark.parametrize(
    ("total_steps", "training", "due"),
    [
        (4, {"eval_steps": 2, "save_steps": 2}, True),
        (5, {"eval_steps": 1, "save_steps": 2}, False),
        (5, {"eval_steps": 2, "save_strategy": "best"}, False),
        (5, {"eval_steps": 1, "save_strategy": "best"}, True),
    ],
)
def test_whether_a_longer_run_saves_the_last_step_too(total_steps, training, due):
    run = recorded(total_steps, **training)
    run.losses = {total_steps: 0.5}
    take_steps(run)
    run.end()
    assert run.due == due


def test_an_evaluation_is_cut_short():
    run = recorded(4, step=2)
    seen = []
    with pytest.raises(Interrupted, match="after step 2; a checkpoint was saved"):
        for batch in run._until_told(iter([1, 2, 3])):
            seen.append(batch)
            run.received.append(signal.SIGHUP)
    assert seen == [1] and run.calls == ["save 2"]
    run = recorded(4)
    run.received.append(signal.SIGHUP)
    with pytest.raises(Interrupted, match="before the first step; there was nothing to save"):
        next(run._until_told(iter([1])))
    assert run.calls == []


def test_a_finished_run_takes_no_step():
    run = recorded(3, step=3)
    take_steps(run)
    assert run.calls == []


def test_the_first_and_last_steps_are_logged_besides_every_few():
    for training, steps in (
        ({"logging_steps": 3}, [1, 3, 6, 7]),
        ({"logging_strategy": "no"}, [1, 7]),
        ({"logging_steps": 3, "eval_steps": 2, "early_stopping_patience": 1}, [1, 3, 4]),
        ({"logging_steps": 2, "eval_steps": 2, "early_stopping_patience": 1}, [1, 2, 4]),
    ):
        run = recorded(7, **training)
        take_steps(run)
        assert run.logged == steps


def done(run: Recorded) -> list[str]:
    return [call for call in run.calls if call.startswith(("evaluate", "save"))]


@pytest.mark.parametrize(
    ("training", "calls"),
    [
        ({}, ["evaluate 7"]),
        (
            {"eval_strategy": "epoch", "save_strategy": "epoch"},
            ["evaluate 3", "save 3", "evaluate 6", "save 6", "evaluate 7"],
        ),
        ({"save_strategy": "epoch"}, ["save 3", "save 6", "evaluate 7"]),
        (
            {"eval_steps": 0.4, "save_steps": 0.8},
            ["evaluate 3", "evaluate 6", "save 6", "evaluate 7"],
        ),
        ({"eval_strategy": "steps", "logging_steps": 4}, ["evaluate 4", "evaluate 7"]),
        ({"save_strategy": "steps"}, ["evaluate 7"]),
        ({"eval_strategy": "no", "save_strategy": "no"}, ["evaluate 7"]),
    ],
    ids=str,
)
def test_strategies(training, calls):
    run = recorded(7, **training)
    take_steps(run)
    assert done(run) == calls


def test_the_best_so_far_is_saved():
    run = recorded(5, eval_steps=1, save_strategy="best")
    run.losses = {1: 3.0, 2: 4.0, 3: 2.0, 4: 2.0, 5: 9.0}
    take_steps(run)
    assert [call for call in done(run) if "save" in call] == ["save 1", "save 3"]


def test_a_run_stops_early_and_stays_stopped():
    settings = {"eval_steps": 2, "early_stopping_patience": 2}
    run = recorded(20, **settings)
    run.losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1, 10: 0.1}
    take_steps(run)
    assert run.step == 8 and done(run)[-1] == "evaluate 8"
    (said,) = run.terminal
    assert said.startswith("stopped early at step 8: eval_loss has not improved for")
    again = recorded(20, step=8, **settings)
    again.evaluations = run.evaluations
    take_steps(again)
    assert again.step == 8 and again.calls == []
    more = recorded(20, step=8, **settings | {"early_stopping_patience": 3})
    more.evaluations, more.losses = run.evaluations, run.losses
    take_steps(more)
    assert more.step == 16  # 10 is better, 12 to 16 are not
