"""Orbax checkpoints: trainable arrays, optimizer state, step, and the identity of the run.

The first process reads and writes them unsharded, whatever the mesh. The base model is not copied.
Its fingerprint is stored instead, along with the data fingerprint and every setting that affects
the arithmetic, so a resumed run either continues exactly or reports why it cannot.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_flax import on_host
from phi3_jax.errors import UserError
from phi3_jax.sharding.mesh import place
from phi3_jax.sharding.processes import first_to_all, is_first, on_first
from phi3_jax.training.identity import differences
from phi3_jax.training.interrupt import report
from phi3_jax.training.output import Output
from phi3_jax.training.state_files import (
    Damaged,
    read_arrays,
    read_record,
    remove,
    rewrite_record,
    saved_steps,
    set_aside,
    write_checkpoint,
)
from phi3_jax.training.step import TrainState
from phi3_jax.training.strategies import Best


class Checkpoints:
    """The checkpoints of one run, in `output_dir/checkpoints/STEP`.

    Args:
        directory: the checkpoint folder; only the first process looks into it.
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
        if not resume:
            return 0, state
        found = _zeros(state)
        step = on_first(lambda: self._read_last(found, fall_back))
        return (step, self._place(found, state)) if step else (0, state)

    def latest(self) -> int | None:
        """The last saved step, or None."""
        return on_first(lambda: max(saved_steps(self.directory), default=None))

    def best(self) -> int | None:
        """The saved step with the best held-out metrics, or None if none was evaluated.

        Raises:
            UserError: a checkpoint is damaged.
        """
        return on_first(lambda: best_saved(self.directory, self._best))

    def save(
        self,
        step: int,
        state: TrainState,
        metrics: Mapping[str, float],
        position: Any = None,
    ) -> None:
        """Write a checkpoint; it appears under its final name only once complete.

        Args:
            step: steps taken so far.
            state: the state to save.
            metrics: held-out metrics of this step, if evaluated. A checkpoint that was saved before
                its evaluation gets them now.
            position: where streamed data goes on (`position_of_all`), JSON values.

        Raises:
            UserError: it cannot be written.
        """
        if on_first(lambda: step in saved_steps(self.directory)):
            on_first(lambda: self._add_metrics(step, metrics))
            return
        host = {}
        for name, leaf in flat_arrays(state).items():
            array = on_host(leaf)
            if is_first():
                host[name] = array
        about = {"metrics": _finite(metrics), "position": position}
        on_first(lambda: self._write(step, host, about))

    def position(self, step: int) -> Any:
        """Where streamed data goes on after a saved step; None for data that is not streamed."""
        return on_first(lambda: read_record(self.directory, step).get("position"))

    def restore(self, step: int, template: TrainState) -> TrainState:
        """Load the state at a step, placed like `template`.

        Raises:
            UserError: the checkpoint is damaged or belongs to a different run.
        """
        found = _zeros(template)
        on_first(lambda: self._read(step, found))
        return self._place(found, template)

    def _place(self, found: dict[str, np.ndarray], template: TrainState) -> TrainState:
        placed = [
            place(first_to_all(found[name]), leaf.sharding)
            for name, leaf in flat_arrays(template).items()
        ]
        state: TrainState = jax.tree.unflatten(jax.tree.structure(template), placed)
        return state

    def _write(self, step: int, host: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        if self._output is not None:
            self._output.check()
        self.directory.mkdir(parents=True, exist_ok=True)
        write_checkpoint(self.directory, step, host, self.identity | about)
        self._remove_old()
        if self._output is not None:
            self._output.copy()

    def _add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        record = read_record(self.directory, step)
        if metrics and not record["metrics"]:
            rewrite_record(self.directory, step, record | {"metrics": _finite(metrics)})

    def _remove_old(self) -> None:
        if self._limit is None:
            return
        steps = saved_steps(self.directory)
        best = best_saved(self.directory, self._best, damaged_too=False)
        kept = {*steps[-self._limit :], *([] if best is None else [best])}
        for step in set(steps) - kept:
            remove(self.directory, step)

    def _read(self, step: int, found: dict[str, np.ndarray]) -> None:
        """Replace the arrays with those of a checkpoint."""
        record = read_record(self.directory, step)
        self._check(self.directory / str(step), record)
        found.update(read_arrays(self.directory, record, found))

    def _read_last(self, found: dict[str, np.ndarray], fall_back: bool) -> int | None:
        """Replace the arrays with those of the last checkpoint, and return its step."""
        damaged: list[str] = []
        for step in reversed(saved_steps(self.directory)):
            try:
                self._read(step, found)
            except Damaged as error:
                damaged.append(str(error))
                if fall_back:
                    aside = set_aside(self.directory, step)
                    report(f"warning: {error}; renamed to {aside.name}, and not used")
                continue
            if damaged and not fall_back:
                raise UserError(
                    f"{'; '.join(damaged)}. The checkpoint of step {step} before it is sound: pass "
                    "--resume=auto to continue from that one, with the same result"
                )
            return step
        if damaged and not fall_back:
            raise UserError(
                f"{'; '.join(damaged)}. There is no other checkpoint: pass --resume=auto to start "
                "again from the first step, with the same result"
            )
        return None

    def _check(self, where: Path, saved: dict[str, Any]) -> None:
        if problems := differences(saved, self.identity):
            raise UserError(
                f"{where}: this run cannot resume from it: {'; '.join(problems)}. Restore these "
                "settings, or start a new run in another training.output_dir"
            )


def best_saved(folder: Path, best: Best, damaged_too: bool = True) -> int | None:
    """The saved step with the best held-out metrics, or None if none was evaluated.

    Raises:
        UserError: a checkpoint is damaged, unless those are passed over.
    """
    found = {}
    for step in saved_steps(folder):
        try:
            found[step] = read_record(folder, step)["metrics"]
        except Damaged:
            if damaged_too:
                raise
    return best.choose(found)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """What JSON can hold; a metric that is not finite is no one's best."""
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


def _zeros(state: TrainState) -> dict[str, np.ndarray]:
    """Arrays to be replaced by saved ones."""
    return {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in flat_arrays(state).items()}


def flat_arrays(state: TrainState) -> dict[str, jax.Array]:
    """Arrays keyed by path: stable names, independent of Flax and optax classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    # Numbered because Orbax returns dictionaries sorted by key.
    return {
        f"{i:05d} {jax.tree_util.keystr(path, simple=True, separator='.')}": leaf
        for i, (path, leaf) in enumerate(leaves)
    }
