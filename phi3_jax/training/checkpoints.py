"""Orbax checkpoints: trainable arrays, optimizer state, step, and the identity of the run.

Every process writes the blocks of the arrays that its devices hold, in a thread beside the training
loop, and reads those that its devices need, whatever mesh they were written on. The base model is
not copied. Its fingerprint is stored instead, along with the data fingerprint and every setting
that affects the arithmetic, so a resumed run either continues exactly or reports why it cannot.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from lora_flax import on_host
from phi3_jax.errors import UserError
from phi3_jax.sharding.processes import is_first, on_first
from phi3_jax.training.digests import digests
from phi3_jax.training.identity import differences
from phi3_jax.training.interrupt import report
from phi3_jax.training.output import Output
from phi3_jax.training.reading import first_reads, read_state
from phi3_jax.training.shards import flat_arrays, layout_of, layout_on_first, writes
from phi3_jax.training.state_files import (
    FORMAT,
    Damaged,
    commit,
    read_record,
    remove,
    rewrite_record,
    saved_records,
    saved_steps,
    set_aside,
    start_part,
)
from phi3_jax.training.step import TrainState
from phi3_jax.training.strategies import Best
from phi3_jax.training.writing import Writing


class Checkpoints:
    """The checkpoints of one run, in `output_dir/checkpoints/STEP`; a context that waits for them.

    All processes call every method. An exception that leaves the context is not replaced by one
    about a checkpoint, which is then printed.

    Args:
        directory: the checkpoint folder.
        identity: identity of the run (`run_identity`), checked on restore.
        save_total_limit: number of most recent checkpoints to keep, in addition to the best one.
            None keeps all.
        output: the run's folder, which must still be this run's when a checkpoint is written.
        best: which checkpoint is best.
    """

    def __init__(
        self,
        directory: Path,
        identity: dict[str, Any],
        save_total_limit: int | None,
        output: Output | None = None,
        best: Best = Best("eval_loss", greater=False),  # noqa: B008 (immutable)
    ):
        self.directory, self.identity = directory, identity
        self._limit, self._output, self._best = save_total_limit, output, best
        self._writing: Writing | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except UserError as problem:
            if error is None:
                raise
            report(f"warning: {problem}")

    def start(self, state: TrainState, resume: bool, fall_back: bool) -> tuple[int, TrainState]:
        """Where a run or sweep starts: steps already taken, and the state after them.

        A new one starts at step 0 with the given state. A resumed one continues from the last
        checkpoint, and its metrics from the same step (see `open_metrics`).

        Args:
            state: the state before the first step, placed on the mesh.
            resume: continue from the last checkpoint.
            fall_back: put damaged checkpoints aside and continue from the last sound one, or from
                the start, which gives the same result.

        Raises:
            UserError: the checkpoint is damaged or belongs to a different run.
        """
        return (resume and self._read_last(state, fall_back)) or (0, state)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            UserError: it could not be written.
        """
        if (writing := self._writing) is not None:
            writing.join()
            self._writing = None
            if writing.problem:
                raise writing.problem

    def latest(self) -> int | None:
        """The last saved step, or None."""
        self.wait()
        return on_first(lambda: max(saved_steps(self.directory), default=None))

    def best(self) -> int | None:
        """The saved step with the best held-out metrics, or None (`Best.choose_saved`).

        A checkpoint whose record is damaged is passed over.
        """
        self.wait()
        return on_first(lambda: self._best.choose_saved(saved_records(self.directory)[0]))

    def restore_best(self, template: TrainState, fall_back: bool) -> tuple[int, TrainState] | None:
        """The best saved step and its state, placed like `template`; None if none was evaluated.

        Args:
            template: a state with the shardings to use.
            fall_back: put damaged checkpoints aside and take the best of the others.

        Raises:
            UserError: a checkpoint is damaged.
        """
        self.wait()
        for step, damage in on_first(lambda: list(saved_records(self.directory)[1].items())):
            self._give_up(step, damage, fall_back)
        while (best := self.best()) is not None:
            try:
                return best, self.restore(best, template)
            except Damaged as error:
                self._give_up(best, str(error), fall_back)
        return None

    def save(
        self,
        step: int,
        state: TrainState,
        metrics: Mapping[str, float],
        position: Any = None,
        due: bool = True,
    ) -> None:
        """Start to write a checkpoint; it appears under its final name only once complete.

        This returns when the arrays have been copied to the host. It waits for the checkpoint
        before it, if that one is still being written.

        Args:
            step: steps taken so far.
            state: the state to save.
            metrics: held-out metrics of this step, if evaluated. A checkpoint that was saved before
                its evaluation gets them now.
            position: where streamed data continues (`position_of_all`), JSON values.
            due: whether a run of any length saves this step (see `Best.choose_saved`).

        Raises:
            UserError: the one before it could not be written.
        """
        self.wait()
        found = {"metrics": _finite(metrics), "due": due}
        if on_first(lambda: self._is_saved(step)):
            on_first(lambda: self._add_metrics(step, found))
            return
        arrays = flat_arrays(state)
        own: Mapping[str, jax.Array | np.ndarray]
        if self._output is None or self._output.each_writes:
            layouts = {name: layout_of(array) for name, array in arrays.items()}
            own = {name: array for name, array in arrays.items() if writes(array)}
        else:
            layouts = {name: layout_on_first(array) for name, array in arrays.items()}
            own = _all_on_first(arrays)
        saved = {
            name: layouts[name].to_json() | {"digest": digest.text}
            for name, digest in digests(arrays).items()
        }
        about = found | {"position": position, "format": FORMAT}
        record = self.identity | about | {"arrays": saved}
        self._writing = Writing(
            self.directory,
            step,
            lambda: self._start_part(step, own),
            lambda: self._commit(step, record),
        )
        self._writing.start()

    def position(self, step: int) -> Any:
        """Where streamed data continues after a saved step; None for data that is not streamed."""
        return on_first(lambda: read_record(self.directory, step).get("position"))

    def restore(self, step: int, template: TrainState) -> TrainState:
        """Load the state at a step, placed like `template`.

        Raises:
            UserError: the checkpoint is damaged or belongs to a different run.
        """
        self.wait()
        return self._read(step, template)

    def _is_saved(self, step: int) -> bool:
        if self._output is not None:
            self._output.check()
        return step in saved_steps(self.directory)

    def _start_part(
        self, step: int, own: Mapping[str, jax.Array | np.ndarray]
    ) -> Callable[[], object]:
        if not own:
            return lambda: None
        finish = start_part(self.directory, step, jax.process_index(), own)
        output = self._output
        return finish if output is None else lambda: output.send_part(step, finish())

    def _commit(self, step: int, record: Mapping[str, Any]) -> None:
        if self._output is not None:
            self._output.check()
        commit(self.directory, step, record)
        self._remove_old()
        if self._output is not None:
            self._output.copy()

    def _add_metrics(self, step: int, found: dict[str, Any]) -> None:
        record = read_record(self.directory, step)
        if found["metrics"] and not record["metrics"]:
            rewrite_record(self.directory, step, record | found)

    def _remove_old(self) -> None:
        if self._limit is None:
            return
        steps = saved_steps(self.directory)
        best = self._best.choose_saved(saved_records(self.directory)[0])
        kept = {*steps[-self._limit :], *([] if best is None else [best])}
        for step in set(steps) - kept:
            remove(self.directory, step)

    def _read(self, step: int, template: TrainState) -> TrainState:
        record = first_reads(lambda: self._record(step))
        return read_state(self.directory, record, template, self._output)

    def _record(self, step: int) -> dict[str, Any]:
        record = read_record(self.directory, step)
        self._check(self.directory / str(step), record)
        return record

    def _read_last(self, template: TrainState, fall_back: bool) -> tuple[int, TrainState] | None:
        """The last checkpoint's step and state."""
        damages: list[str] = []
        for step in reversed(on_first(lambda: saved_steps(self.directory))):
            try:
                state = self._read(step, template)
            except Damaged as error:
                damages.append(str(error))
                if fall_back:
                    on_first(functools.partial(self._set_aside, step, damages[-1]))
                continue
            if damages and not fall_back:
                raise UserError(
                    f"{'; '.join(damages)}. The checkpoint of step {step} before it is sound: pass "
                    "--resume=auto to continue from that one, with the same result"
                )
            return step, state
        if damages and not fall_back:
            raise UserError(
                f"{'; '.join(damages)}. There is no other checkpoint: pass --resume=auto to start "
                "again from the first step, with the same result"
            )
        return None

    def _give_up(self, step: int, damage: str, fall_back: bool) -> None:
        """Put aside a damaged checkpoint that is, or may be, the best one, or say how to."""
        if not fall_back:
            raise UserError(
                f"{damage}. The best checkpoint is to be exported: pass --resume=auto to put this "
                "one aside and export the best of the others"
            )
        on_first(lambda: self._set_aside(step, damage))

    def _set_aside(self, step: int, damage: str) -> None:
        aside = set_aside(self.directory, step)
        report(f"warning: {damage}; renamed to {aside.name}, and not used")

    def _check(self, where: Path, saved: dict[str, Any]) -> None:
        if problems := differences(saved, self.identity):
            raise UserError(
                f"{where}: this run cannot resume from it: {'; '.join(problems)}. Restore these "
                "settings, or start a new run in another training.output_dir"
            )


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """What JSON can hold; a metric that is not finite cannot be the best."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def saved_choices(folder: Path) -> dict[str, str]:
    """What `auto` meant in the run of the last readable checkpoint (`Setup.choices`)."""

    def read() -> dict[str, str]:
        for step in reversed(saved_steps(folder)):
            with contextlib.suppress(Damaged):
                choices: dict[str, str] = read_record(folder, step)["choices"]
                return choices
        return {}

    return on_first(read)


def _all_on_first(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """The arrays on the host of the first process, one after the other; none on the others."""
    found = {}
    for name, array in arrays.items():
        host = on_host(array)
        if is_first():
            found[name] = host
    return found
