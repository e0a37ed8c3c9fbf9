"""Where the time of a run goes, and what is kept for its report."""

from __future__ import annotations

import json
import warnings

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.training import record as module
from phi3_jax.training.record import Record, open_record


@pytest.fixture
def clock(monkeypatch):
    """Moves the clock forward by the seconds given."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_phases_add_up_to_the_wall_time(tmp_path, clock):
    record = Record(tmp_path)
    clock(1.0)
    record.enter("steps")
    clock(70.0)
    record.compiled(30.0)
    with record.during("evaluation"):
        clock(9.0)
    clock(20.0)
    assert record.summary() == (
        "wall time 1:40: goodput 60% (steps), compiling 0:30, evaluation 0:09, start 0:01"
    )
    record.begin(0, 5, {"data": {}})
    attempt = json.loads((tmp_path / "run.json").read_text())["attempts"][0]
    assert attempt["seconds"] == {"start": 1, "steps": 60, "compiling": 30, "evaluation": 9}


def test_a_resumed_run_keeps_its_earlier_starts(tmp_path):
    for first_step, count in ((0, 1), (3, 2), (5, 3), (0, 1)):
        record = Record(tmp_path)
        record.begin(first_step, 9, {})
        record.write(first_step + 1)
        attempts = json.loads((tmp_path / "run.json").read_text())["attempts"]
        assert len(attempts) == count and attempts[-1]["step"] == first_step + 1


def test_reports_of_a_run_in_progress_take_little_of_its_time(tmp_path, clock, monkeypatch):
    written = []

    def write(folders):
        written.append(json.loads((tmp_path / "run.json").read_text())["attempts"][-1]["step"])
        clock(1.0)
        if len(written) == 3:
            raise ValueError("no matplotlib")

    monkeypatch.setattr(module, "write_report", write)
    record = Record(tmp_path)
    record.report(1)  # before the run has begun
    record.begin(0, 9, {})
    for step, seconds in enumerate((0.0, 19.0, 2.0, 30.0, 100.0), start=1):
        clock(seconds)
        record.report(step)
    assert written == [1, 3, 4]  # after a failure it is left to the end
    assert record.end().startswith("report: ") and len(written) == 4
    assert record.as_dict()["attempts"][-1]["seconds"]["reports"] == 3.0


def test_before_training_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="bad"), open_record(tmp_path, None) as record:
        record.write(0)
        raise ValueError("bad")
    assert not list(tmp_path.iterdir())


def test_compiling_and_warnings_are_heard(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *warning: shown.append(warning))
    with open_record(tmp_path, "x") as record, warnings.catch_warnings():
        warnings.simplefilter("default")
        record.begin(0, 1, {})
        warnings.warn("short rows", stacklevel=1)
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(3))
        record.end()
    (attempt,) = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert attempt["seconds"]["compiling"] > 0
    assert attempt["warnings"] == ["warning: short rows"] and len(shown) == 1


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    record = Record(tmp_path)
    assert record.end().startswith("no report")
    record.begin(0, 1, {})
    assert record.end() == f"report: {tmp_path}/report.html"

    def fail(folders):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(module, "write_report", fail)
    assert record.end() == "warning: no report could be written (RuntimeError: no fonts)"
