"""When a run evaluates, saves, and stops, against transformers' own arguments and callbacks."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import transformers
from transformers.trainer_callback import TrainerControl, TrainerState

from phi3_jax import UserError
from phi3_jax.config.run import RunConfig
from phi3_jax.config.training import TrainingConfig
from phi3_jax.training.strategies import Best, EarlyStopping, Strategies


def training(**fields) -> TrainingConfig:
    return TrainingConfig(output_dir="x", **fields)


@pytest.mark.parametrize("steps", [1, 7, 100, 1234])
@pytest.mark.parametrize("every", [0.001, 0.1, 0.3, 0.999, 1, 5, 5.0])
def test_steps_and_fractions(steps, every):
    state = TrainerState()
    fields = {"logging_steps": every, "eval_steps": every, "save_steps": every}
    theirs = transformers.TrainingArguments(
        output_dir="x", eval_strategy="steps", use_cpu=True, report_to=[], **fields
    )
    state.compute_steps(theirs, steps)
    ours = Strategies.of(training(**fields), steps, 4)
    assert (ours.log, ours.evaluate, ours.save) == (
        state.logging_steps, state.eval_steps, state.save_steps
    )  # fmt: skip


def hf_stops(losses, patience, threshold, greater) -> int | None:
    """Which evaluation ends a run of HF's `Trainer`, counted from 1."""
    args = SimpleNamespace(metric_for_best_model="eval_x", greater_is_better=greater)
    args.save_strategy, state = "steps", TrainerState()
    trainer = SimpleNamespace(args=args, state=state)
    callback = transformers.EarlyStoppingCallback(patience, threshold)
    for count, value in enumerate(losses, start=1):
        control = TrainerControl()
        metrics = {} if value is None else {"eval_x": value}
        callback.on_evaluate(args, state, control, metrics)
        if control.should_training_stop:
            return count
        if metrics:
            transformers.Trainer._determine_best_metric(trainer, metrics, None)
    return None


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_stops_early_as_transformers(greater, threshold, patience):
    dice = random.Random(patience)
    stopping = EarlyStopping(Best("eval_x", greater), patience, threshold)
    for _ in range(30):
        values = [dice.choice([1.0, 1.3, 1.9, None, 2.0, 2.4, 3.0]) for _ in range(12)]
        known = {0: {"eval_x": -9.0 if not greater else 9.0}}  # before training: does not count
        stopped = None
        for count, value in enumerate(values, start=1):
            # A record without the metric: another one was asked for before a resume.
            known[5 * count] = {"eval_loss": 1.0} if value is None else {"eval_x": value}
            known[5 * count + 1] = {"eval_x": 0.0}  # not a regular one
            if stopping.stops(known, 5):
                stopped = count
                break
            del known[5 * count + 1]
        assert stopped == hf_stops(values, patience, threshold, greater)


def test_a_metric_that_is_not_a_number_is_no_improvement():
    """Unlike a missing one."""
    stopping = EarlyStopping(Best("eval_x", greater=False), 2, 0.0)
    records = {5: {"eval_x": 1.0}, 10: {"eval_x": math.nan}, 15: {"eval_x": math.nan}}
    assert stopping.stops(records, 5)
    assert not stopping.stops(records | {10: {"eval_loss": 1.0}}, 5)


def test_what_is_best():
    records = {3: {"eval_loss": math.nan}, 9: {"eval_loss": 2.0}}
    records |= {6: {"eval_loss": 2.0, "eval_f": 1.0}}
    assert Best.of(training()).choose(records) == 6
    assert Best.of(training(metric_for_best_model="f")).choose(records) == 6
    assert Best.of(training(metric_for_best_model="eval_g")).choose(records) is None
    for metric, greater in (("perplexity", False), ("eval_mean_token_accuracy", True)):
        assert Best.of(training(metric_for_best_model=metric)) == Best(
            f"eval_{metric.removeprefix('eval_')}", greater
        )
    assert Best.of(training(greater_is_better=True)).greater


def test_fractions_that_leave_a_checkpoint_without_an_evaluation():
    config = training(eval_steps=0.2, save_steps=0.5, load_best_model_at_end=True)
    assert Strategies.of(config, 4, 1).save == 2
    with pytest.raises(UserError, match=r"save_steps: 0.5 of 10 steps is every 5 and eval_steps"):
        Strategies.of(config, 10, 1)


BEST = {"load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_steps": 1.5}, "1.5 must be an integer, or a fraction of all steps"),
        ({"logging_steps": 0}, "logging_steps"),
        (
            {"eval_strategy": "epoch", "eval_steps": 5},
            "eval_steps: 5 has no effect with eval_strat",
        ),
        (
            {"save_strategy": "best", "eval_steps": 5, "save_steps": 5},
            "save_steps: 5 has no effect",
        ),
        ({"save_strategy": "best"}, "save_strategy: best needs evaluations; set eval_steps or"),
        ({"early_stopping_patience": 1}, "early_stopping_patience: 1 needs evaluations"),
        (
            BEST | {"eval_strategy": "epoch", "save_steps": 5},
            "save_strategy: steps must be best or",
        ),
        (BEST | {"eval_strategy": "epoch"}, "but save_strategy is no: set eval_steps and"),
        ({"metric_for_best_model": "rougeL"}, "'rougeL' is not among the metrics of this run's"),
    ],
)
def test_strategies_that_cannot_be(fields, message):
    run = {"model": {"path": "m"}, "data": {"path": "d", "test_size": 2}}
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(run | {"training": {"output_dir": "o"} | fields})


@pytest.mark.parametrize("key", ["early_stopping_patience", "save_strategy", "eval_strategy"])
def test_they_need_held_out_rows(key):
    fields = {"eval_strategy": "epoch", "early_stopping_patience": 1, "save_strategy": "best"}
    run = {"model": {"path": "m"}, "data": {"path": "d"}, "training": {"output_dir": "o"} | fields}
    with pytest.raises(ValueError, match=f"training.{key}: .* needs held-out rows"):
        RunConfig.model_validate(run)


def test_a_sweep_goes_to_the_last_step():
    run = {"model": {"path": "m"}, "data": {"path": "d", "test_size": 2}, "sweep": {"r": [1, 2]}}
    for fields in ({"early_stopping_patience": 1}, {"save_strategy": "best"}):
        fields |= {"output_dir": "o", "eval_strategy": "epoch"}
        with pytest.raises(ValueError, match="a sweep trains, saves and exports all members to"):
            RunConfig.model_validate(run | {"training": fields})
