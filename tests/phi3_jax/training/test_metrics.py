"""metrics.jsonl, the trackers, and the sums between log lines."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.training import metrics
from phi3_jax.training.metrics import MetricsWriter, Window, open_metrics, read_evaluations
from phi3_jax.training.step import StepMetrics
from tests.phi3_jax.conftest import make_config


def step_metrics(loss: float, targets: int, finite: bool = True) -> StepMetrics:
    values = (loss, 0.5, 1.0, targets)
    return StepMetrics(*(np.float32(value) for value in values), np.bool_(finite))


def batch_of(tokens: int) -> dict[str, np.ndarray]:
    return {"segment_ids": np.arange(40).reshape(1, 2, 20) < tokens}


@pytest.fixture
def write(tmp_path):
    """Writes records and gives the lines of metrics.jsonl, strictly parsed."""

    def write(records: list[tuple[int, dict]], first_step: int = 0) -> list[dict]:
        config = make_config(Path("x"), Path("y"), tmp_path)
        with open_metrics(config, tmp_path, first_step) as writer:
            for step, record in records:
                writer.write(step, record)
            write.evaluations = read_evaluations(tmp_path)
        text = (tmp_path / "metrics.jsonl").read_text()
        return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]

    return write


@pytest.fixture
def clock(monkeypatch):
    """Turns the clock on by so many seconds."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_window_is_a_mean_over_targets_not_over_steps(clock):
    window = Window()
    clock(1.0)
    window.add(step_metrics(2.0, 10), batch_of(30))
    clock(60.0)
    window.start()  # an evaluation ends here
    clock(3.0)
    window.add(step_metrics(5.0, 30), batch_of(10))
    assert window.tokens_per_second == 10.0
    record = window.take()
    assert record.pop("padding") == 0.5  # 30 and 10 tokens in 40 positions each
    assert record == {"loss": 4.25, "mean_token_accuracy": 0.5, "tokens_per_second": 10.0}
    assert window.tokens_per_second == 0.0


def test_window_of_skipped_steps_alone_has_no_loss(clock):
    window = Window()
    clock(2.0)
    window.add(step_metrics(math.nan, 10, finite=False), batch_of(8))
    record = window.take()
    assert record.keys() == {"tokens_per_second", "padding"}
    assert record["tokens_per_second"] == 4.0


def test_what_is_not_finite_is_null(write):
    (line,) = write([(1, {"loss": 1.5, "grad_norm": math.inf, "eval_loss": math.nan})])
    assert line == {"step": 1, "loss": 1.5, "grad_norm": None, "eval_loss": None}
    assert math.isnan(write.evaluations[1]["eval_loss"])  # evaluated all the same


def test_resumed_file_has_each_step_once_and_knows_the_evaluations(write, tmp_path):
    write([(0, {"eval_loss": 3.0}), (1, {"loss": 3.0}), (2, {"loss": 2.5}), (2, {"eval_loss": 2.0}),
           (3, {"loss": 2.0})])  # fmt: skip
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    lines = write([(3, {"loss": 1.0})], first_step=2)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3]
    assert lines[-1]["loss"] == 1.0
    assert write.evaluations == {0: {"eval_loss": 3.0}, 2: {"eval_loss": 2.0}}


def test_wandb_asked_for_and_not_there(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(metrics.importlib, "import_module", missing)
    metrics.check_trackers(["tensorboard"])
    with pytest.raises(UserError, match="wandb is not installed: pip install"):
        metrics.check_trackers(["wandb"])


@pytest.mark.parametrize(
    ("mode", "answer", "said"),
    [
        ("online", True, None),
        ("offline", False, None),
        ("disabled", False, None),
        ("online", False, "wandb cannot be used (no API key): run `wandb login`"),
        (
            "online",
            RuntimeError("Failed to\nauthenticate"),
            "wandb cannot be used (Failed to): run",
        ),
    ],
)
def test_wandb_without_a_key(monkeypatch, mode, answer, said):
    """As wandb 0.31 answers: without a key, offline, and with a key that it cannot verify."""

    def login(prompt):
        assert prompt is False
        if isinstance(answer, Exception):
            raise answer
        return answer

    settings = types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
    errors = types.SimpleNamespace(Error=RuntimeError)
    wandb = types.SimpleNamespace(setup=lambda: settings, login=login, errors=errors)
    monkeypatch.setattr(metrics, "_import_wandb", lambda: wandb)
    if said is None:
        metrics.check_trackers(["wandb"])
        return
    with pytest.raises(UserError) as error:
        metrics.check_trackers(["wandb"])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    ids, finished = [], []

    class Wandb:
        def init(self, **kwargs):
            assert kwargs["resume"] == "allow"
            ids.append(kwargs["id"])
            return self

        def finish(self):
            finished.append(True)

    monkeypatch.setattr(metrics, "_import_wandb", Wandb)
    config = make_config(Path("x"), Path("y"), tmp_path, report_to=["wandb"])
    for first_step in (0, 3, 0):
        with open_metrics(config, tmp_path, first_step):
            pass
    assert ids[0] == ids[1] != ids[2]
    assert len(finished) == 3


def test_files_are_closed_after_an_error_in_the_middle(tmp_path):
    config = make_config(Path("x"), Path("y"), tmp_path)
    with pytest.raises(RuntimeError), open_metrics(config, tmp_path, first_step=0) as writer:
        raise RuntimeError
    with pytest.raises(ValueError, match="closed file"):
        writer.write(1, {"loss": 1.0})


def test_without_sinks_nothing_is_written():
    MetricsWriter().write(1, {"loss": 1.0})
