"""Every state in which a crash can leave a run's folder is one that the next start gets out of.

While checkpoints are saved, replaced and removed, the folder is copied before every file operation
that Python sees. Each copy is what a process leaves that is killed there; with a file cut short, it
is what a machine leaves that loses its power.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.output import open_output
from tests.phi3_jax.training.test_checkpoints import IDENTITY, state_of

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


class Recorder:
    """Copies a folder before each operation on it; a copy that equals the last one is dropped."""

    def __init__(self, folder: Path, copies: Path):
        self.folder, self.copies, self.on = folder, copies, False
        self.states: list[Path] = []
        self._seen: set[str] = set()
        sys.addaudithook(self._before)  # stays until the process ends

    def _before(self, event: str, arguments: tuple) -> None:
        if not self.on or event not in OPERATIONS or str(self.folder) not in str(arguments[0]):
            return
        self.on = False
        self.copy()
        self.on = True

    def copy(self) -> None:
        files = sorted(path for path in self.folder.rglob("*"))
        about = [(str(p), p.read_bytes() if p.is_file() else b"") for p in files]
        digest = hashlib.sha256(repr(about).encode()).hexdigest()
        if digest not in self._seen:
            self._seen.add(digest)
            self.states.append(self.copies / str(len(self.states)))
            shutil.copytree(self.folder, self.states[-1])


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> list[Path]:
    run, copies = (tmp_path_factory.mktemp(name) for name in ("run", "copies"))
    recorder = Recorder(run, copies)
    recorder.on = True
    with open_output(str(run), resume=False) as opened:
        checkpoints = Checkpoints(opened.checkpoints, IDENTITY, 1, opened)
        for step, loss in ((2, 1.0), (4, None), (4, 3.0), (6, 2.0), (8, 0.5)):
            checkpoints.save(step, state_of(step), loss)
    recorder.on = False
    recorder.copy()
    return recorder.states


def start_again(run: Path) -> int:
    """The step from which `--resume=auto` continues; its arrays are those of that step."""
    with open_output(str(run), resume="auto") as opened:
        checkpoints = Checkpoints(opened.checkpoints, IDENTITY, 1, opened)
        step, state = checkpoints.start(state_of(0), opened.resume, opened.fall_back)
        np.testing.assert_array_equal(state.trainable["lora_A"][...], np.full((2, 3), step))
        np.testing.assert_array_equal(state.opt_state["mu"], np.full((2, 3), -step))
        left = {path.name for path in run.rglob("*") if "tmp" in path.name}
        assert not left
        checkpoints.save(10, state_of(10), 0.1)  # and the run continues
        assert checkpoints.latest() == 10
    return step


def test_killed_before_every_operation(states, tmp_path):
    """Never back by more than the save that was under way, and never in doubt about the numbers."""
    steps = []
    for number, state in enumerate(states):
        run = tmp_path / str(number)
        shutil.copytree(state, run)
        steps.append(start_again(run))
    assert len(states) > 20 and steps == sorted(steps)
    assert set(steps) == {0, 2, 4, 6, 8}


def test_power_lost_at_every_save(states, tmp_path):
    """One file of each state is cut short: an earlier checkpoint is taken, or the start."""
    dice = random.Random(0)
    for number, state in enumerate(states[::3]):
        run = tmp_path / str(number)
        shutil.copytree(state, run)
        files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
        if files:
            file = dice.choice(files)
            file.write_bytes(file.read_bytes()[: dice.randrange(file.stat().st_size)])
        assert start_again(run) in (0, 2, 4, 6, 8)
