"""`training.profile_steps`: a trace of some steps for XProf and Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from phi3_jax.errors import UserError
from phi3_jax.sharding.processes import is_first

FOLDER = "profile"


class Profile:
    """The trace of the steps from one to another, both included; without steps, nothing.

    JAX writes `plugins/profile/TIME/*.xplane.pb` and `perfetto_trace.json.gz` into the folder.

    Args:
        steps: the first step and the last, counted from 1, if any.
        folder: `output_dir/profile`.
    """

    def __init__(self, steps: Sequence[int] | None = None, folder: Path = Path(FOLDER)):
        self._steps, self._folder = steps, folder
        self._tracing = False

    @classmethod
    def of_run(
        cls, steps: Sequence[int] | None, output: Path, first_step: int, total_steps: int
    ) -> Profile:
        """The trace of a run, on its first process.

        Args:
            steps: `training.profile_steps`.
            output: the run's output folder.
            first_step: steps already taken; the trace begins with the next one at the earliest.
            total_steps: steps of the whole run.

        Raises:
            UserError: the run does not have these steps.
        """
        if steps is not None and steps[1] > total_steps:  # on every process
            raise UserError(
                f"training.profile_steps: {list(steps)}, but the run has {total_steps} steps"
            )
        if steps is None or first_step >= steps[1] or not is_first():
            return cls()
        return cls((max(steps[0], first_step + 1), steps[1]), output / FOLDER)

    @contextlib.contextmanager
    def step(self, number: int, before: Any) -> Iterator[None]:
        """Dispatch a step within the block; the trace begins and ends between two steps.

        Args:
            number: the step, counted from 1.
            before: arrays of the state before it, which are waited for.
        """
        if self._steps is None:
            yield
            return
        if number == self._steps[0]:
            jax.block_until_ready(before)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def end(self, number: int, after: Any) -> Path | None:
        """Write the trace if that was its last step.

        Args:
            number: the step that was dispatched.
            after: arrays of the state after it, which are waited for.

        Returns:
            The folder, if the trace was written now.
        """
        if not self._tracing or self._steps is None or number < self._steps[1]:
            return None
        jax.block_until_ready(after)
        self.close()
        return self._folder

    def close(self) -> None:
        """Write the trace so far, where the run ends within it."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
