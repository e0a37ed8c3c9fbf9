"""A checkpoint that is written while training continues.

Each process writes its own part, and tells the first one when it is on disk, or why it is not. The
first then gives the checkpoint its record and name, and tells the others how that ended. They talk
through JAX's coordinator, which threads may use at any time, unlike a collective operation.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from phi3_jax.buckets import Outage
from phi3_jax.errors import UserError, storage_problem
from phi3_jax.sharding.processes import hear, is_first, tell
from phi3_jax.training.state_files import first_line, saved_steps, temporary

# For the slowest disk or bucket; a process that died ends the others long before.
PART_SECONDS = 3600.0
# All processes save the same checkpoints in the same order.
_NUMBERS = itertools.count()


class Writing(threading.Thread):
    """One checkpoint being written, from the moment its arrays are on the host.

    Args:
        folder: the checkpoints of the run.
        step: steps taken so far.
        start: starts to write this process's part and returns what finishes it.
        commit: called on the first process when all parts are on disk.

    Attributes:
        problem: once the thread has ended, why there is no checkpoint, if there is none.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        start: Callable[[], Callable[[], object]],
        commit: Callable[[], None],
    ):
        super().__init__(name=f"checkpoint of step {step}", daemon=True)
        self._folder, self._step, self._commit = folder, step, commit
        self._key = f"phi3-jax/checkpoint/{next(_NUMBERS)}"
        self.problem: UserError | None = None
        started: list[Callable[[], object]] = []
        self._part_problem = _problem_of(lambda: started.append(start()))
        self._finish = started[0] if started else lambda: None

    def run(self) -> None:
        """Finish the part, and the checkpoint with the other processes."""
        problem = self._part_problem or _problem_of(self._finish)
        if not is_first():
            _tell(f"{self._key}/{jax.process_index()}", problem)
            self.problem = _heard(f"{self._key}/end")
            return
        for number in range(1, jax.process_count()):
            # All are heard, or one might still write into the folder when it is removed.
            if other := _heard(f"{self._key}/{number}"):
                problem = problem or type(other)(f"process {number}: {other}")
        if problem := problem or _problem_of(self._commit):
            shutil.rmtree(temporary(self._folder, self._step), ignore_errors=True)
            self.problem = problem if isinstance(problem, Outage) else self._said(problem)
        if jax.process_count() > 1:
            _tell(f"{self._key}/end", self.problem)

    def _said(self, problem: UserError) -> UserError:
        kept = saved_steps(self._folder)
        last = f"the checkpoint of step {kept[-1]} is intact" if kept else "none was saved before"
        return UserError(
            f"{self._folder / str(self._step)}: the checkpoint cannot be written: {problem}, then "
            f"continue with --resume ({last})"
        )


def _problem_of(function: Callable[[], object]) -> UserError | None:
    """What is wrong if the function fails."""
    try:
        function()
    except UserError as error:
        return error
    except Exception as error:  # Orbax and its storage raise many types
        return UserError(storage_problem(error) or first_line(error))
    return None


def _tell(key: str, problem: UserError | None) -> None:
    tell(key, json.dumps([isinstance(problem, Outage), str(problem or "")]))


def _heard(key: str) -> UserError | None:
    try:
        outage, text = json.loads(hear(key, PART_SECONDS))
    except UserError as error:
        return error
    kind = Outage if outage else UserError
    return kind(text) if text else None
