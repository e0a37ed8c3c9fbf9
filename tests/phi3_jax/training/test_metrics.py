"""metrics.jsonl, the trackers, and the sums between log lines."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.model.config import Phi3Config
from phi3_jax.model.flops import lora_step_flops
from phi3_jax.training import metrics
from phi3_jax.training.metrics import (
    MetricsWriter,
    StepFlops,
    Window,
    open_metrics,
    read_evaluations,
)
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
    """Moves the clock forward by the seconds given."""
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


def test_utilization_is_of_a_known_peak(clock):
    batch = batch_of(30) | {"targets": np.ones((1, 2, 20), bool)}
    batch["positions"] = np.broadcast_to(np.arange(20), (1, 2, 20))
    network = Phi3Config(num_hidden_layers=2)
    for peak in (None, 1e12):
        window = Window(StepFlops(network, peak))
        clock(2.0)
        window.add(step_metrics(2.0, 10), batch)
        record = window.take()
        speed = (
            lora_step_flops(network, *(batch[n] for n in ("positions", "segment_ids", "targets")))
            / 2
        )
        assert record["tflops_per_second"] == pytest.approx(speed / 1e12)
        assert record.get("utilization") == (None if peak is None else pytest.approx(speed / peak))


def test_the_peak_is_of_all_devices_if_every_one_is_known():
    kinds = {"TPU v5 lite": 197e12, "NVIDIA H100 80GB HBM3": 989e12, "cpu": None}
    for kind, peak in kinds.items():
        devices = [types.SimpleNamespace(device_kind=kind)] * 4
        assert StepFlops.on(Phi3Config(), devices).peak == (peak and 4 * peak)


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


def test_files_are_closed_after_an_error_in_the_middle(tmp_path):
    config = make_config(Path("x"), Path("y"), tmp_path)
    with pytest.raises(RuntimeError), open_metrics(config, tmp_path, first_step=0) as writer:
        raise RuntimeError
    with pytest.raises(ValueError, match="closed file"):
        writer.write(1, {"loss": 1.0})


def test_without_sinks_nothing_is_written():
    MetricsWriter().write(1, {"loss": 1.0})


def test_evaluations_are_floats(tmp_path):
    """JSON of another program, or of hand, may have integers."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "eval_loss": 3, "eval_x": null}\n')
    (found,) = read_evaluations(tmp_path).values()
    assert all(type(value) is float for value in found.values()) and found["eval_loss"] == 3
