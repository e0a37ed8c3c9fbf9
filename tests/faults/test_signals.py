"""A signal at named points of a run: its exit code, and the same bytes after a resume."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from phi3_jax.cli import train
from phi3_jax.cli.main import main
from phi3_jax.training import loop
from phi3_jax.training.checkpoints import Checkpoints
from tests.faults.boundaries import Sound
from tests.faults.inputs import ROWS

# Where the signal arrives, and the first step that the run then has taken and saved.
POINTS = {
    "loading": (loop, "set_up", 0),
    "before the first step": (loop, "choose_remat", 0),
    "in a step": (loop.Run, "start_step", 1),
    "in an evaluation": (loop.Run, "log_evaluation", 1),
    "while saving": (Checkpoints, "save", 2),
    "at the end": (loop, "export", 4),
}
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A run of four steps, of which each second one is saved."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4] * 2))
    settings = {
        "model": {"path": str(Sound(folder / "sound").base)},
        "peft": {"r": 2},
        "data": {"path": str(folder / "rows.jsonl"), "max_length": 64, "test_size": 2},
        "training": {
            "output_dir": "run", "max_steps": 4, "save_steps": 2, "eval_steps": 2,
            "logging_steps": 1, "per_device_train_batch_size": 2, "report_to": ["none"],
        },
        "mesh": {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder / "config.yaml"


@pytest.fixture(autouse=True, scope="module")
def cached():
    """The runs are on one of the eight devices, so that the cache of programs does no harm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "keep_compiled", lambda: None)
        yield


def start(config: Path) -> int:
    return main(["train", "--config", str(config), "--resume=auto"])


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        assert start(config) == 0
        return Path("run", ADAPTER).read_bytes()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_stops_and_continues(config, whole, tmp_path, monkeypatch, capsys, point, number):
    if number == signal.SIGINT and point not in ("loading", "in a step"):
        pytest.skip("the same handler")
    monkeypatch.chdir(tmp_path)
    holder, name, saved = POINTS[point]
    real = getattr(holder, name)

    def told(*arguments, **settings):
        os.kill(os.getpid(), number)
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, told)
        assert start(config) == 128 + number
    said = capsys.readouterr().err
    assert f"stopped by {number.name}" in said and "Traceback" not in said
    steps = [int(path.name) for path in Path("run/checkpoints").glob("[0-9]*")]
    assert (max(steps, default=0) >= saved) and ("no checkpoint" in said or steps or not saved)
    assert start(config) == 0
    assert Path("run", ADAPTER).read_bytes() == whole
