"""Every schedule against transformers' `get_scheduler`, with its settings and warm-ups."""

from __future__ import annotations

import pytest
import torch
import transformers

from phi3_jax import UserError
from phi3_jax.config.loader import RunConfig, TrainingConfig
from phi3_jax.training.schedules import learning_rate_schedule, warmup_steps

TOTAL, PEAK = 20, 3e-4
SETTINGS = [
    ("linear", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.25}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 3}),
    ("inverse_sqrt", {"timescale": 400}),
    ("warmup_stable_decay", {"num_decay_steps": 6}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "num_stable_steps": 3, "min_lr_ratio": 0.2}),
    *(
        (
            "warmup_stable_decay",
            {"num_decay_steps": 9, "warmup_type": shape, "decay_type": shape, "min_lr_ratio": 0.1},
        )
        for shape in ("linear", "cosine", "1-sqrt")
    ),
]


def training(**fields) -> TrainingConfig:
    return TrainingConfig(output_dir="x", learning_rate=PEAK, **fields)


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize("warmup", [0, 5])
def test_equals_transformers(kind, settings, warmup):
    config = training(lr_scheduler_type=kind, lr_scheduler_kwargs=settings, warmup_steps=warmup)
    schedule = learning_rate_schedule(config, TOTAL)
    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = transformers.get_scheduler(
        name, optimizer, warmup, TOTAL, scheduler_specific_kwargs=dict(settings)
    )
    for step in range(TOTAL + 1):
        expected = scheduler.get_last_lr()[0]
        assert schedule(step) == pytest.approx(expected, rel=1e-5, abs=1e-10), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("steps", [0.0, 0.13, 0.999, 1.0, 5.0, 5.9])
def test_warmup_below_one_is_a_share(steps):
    theirs = transformers.TrainingArguments(output_dir="x", warmup_steps=steps, use_cpu=True)
    assert warmup_steps(training(warmup_steps=steps), TOTAL) == theirs.get_warmup_steps(TOTAL)
    assert warmup_steps(training(warmup_ratio=0.13), TOTAL) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr_scheduler_kwargs": {"power": 2.0}}, "power is no setting of linear; it has none"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}},
            "cycles is no setting of cosine; it has num_cycles",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "cosine_with_min_lr: exactly one of min_lr and min_lr_rate is needed",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1.0}},
            "min_lr 1.0 is above learning_rate",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "2"}},
            "power: Input should be a valid number",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps: Field required"),
    ],
)
def test_settings_that_a_schedule_does_not_have(fields, message):
    run = {"model": {"path": "m"}, "data": {"path": "d"}, "training": {"output_dir": "o"} | fields}
    with pytest.raises(ValueError, match=f"training.lr_scheduler_kwargs: {message}"):
        RunConfig.model_validate(run)


def test_a_sweep_scales_one_schedule():
    run = {"model": {"path": "m"}, "data": {"path": "d"}, "sweep": {"r": [2, 4]}}
    for kind, settings, message in (
        ("polynomial", {}, "polynomial ends at a fixed lr_end"),
        ("cosine_with_min_lr", {"min_lr": 1e-6}, "a sweep needs min_lr_rate"),
    ):
        fields = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": settings}
        with pytest.raises(ValueError, match=message):
            RunConfig.model_validate(run | {"training": {"output_dir": "o"} | fields})


def test_stages_longer_than_the_run():
    settings = {"num_decay_steps": 15, "num_stable_steps": 5}
    config = training(
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=settings, warmup_steps=1
    )
    with pytest.raises(UserError, match="1 warm-up, 5 stable and 15 decay steps exceed the run's"):
        learning_rate_schedule(config, TOTAL)
