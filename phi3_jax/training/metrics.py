"""Metric sinks: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import lora_flax
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import Batch
from phi3_jax.errors import UserError
from phi3_jax.evaluation.held_out import HeldOutMetrics
from phi3_jax.sharding.processes import on_first
from phi3_jax.training.step import StepMetrics

FILE = "metrics.jsonl"


class Lines:
    """A file that grows by whole lines: one that does not fit on the disk is taken back.

    Args:
        path: the file, created if missing.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> None:
        """Write a line; it is with the system when this returns.

        Raises:
            OSError: it cannot be written.
        """
        data, size = f"{line}\n".encode(), os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(size)
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars in TensorBoard's event files, written at once.

    tensorboardX's `SummaryWriter` leaves that to a thread, which dies when the disk is full; from
    then on it would block the run.

    Args:
        folder: the log folder, created if missing.
        purge_step: TensorBoard drops earlier events from this step on; None keeps all.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._folder = Event, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=purge_step, session_log=start))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step.

        Raises:
            OSError: they cannot be written.
        """
        from tensorboardX.summary import scalar

        try:
            for name, value in values.items():
                summary = scalar(name, value)
                event = self._event(wall_time=time.time(), step=step, summary=summary)
                self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            error.filename = str(self._folder)
            raise

    def close(self) -> None:
        """Close the file; what a full disk did not take has been reported before."""
        with suppress(OSError):
            self._writer.close()


class MetricsWriter:
    """Writes each record to all of its sinks; without sinks, writes nothing.

    Args:
        file: metrics.jsonl.
        tensorboard: event files.
        wandb: a wandb run.
    """

    def __init__(
        self,
        file: Lines | None = None,
        tensorboard: TensorBoard | None = None,
        wandb: Any = None,
    ):
        self._file, self._tensorboard, self._wandb = file, tensorboard, wandb

    def write(self, step: int, record: dict[str, float]) -> None:
        """Write one record for a step; it is with the system when this returns.

        JSON cannot represent NaN or infinity: they are written as null and omitted from the curves.

        Raises:
            OSError: it cannot be written.
        """
        finite = {name: value for name, value in record.items() if math.isfinite(value)}
        if self._file is not None:
            nulls = dict.fromkeys(record)
            self._file.append(json.dumps({"step": step} | nulls | finite))
        if self._tensorboard is not None:
            self._tensorboard.add(step, finite)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)


@contextmanager
def open_metrics(config: RunConfig, directory: Path, first_step: int) -> Iterator[MetricsWriter]:
    """Open metrics.jsonl and the trackers in `training.report_to`, and close them at the end.

    Only the first process writes; the others get a writer without sinks.

    Args:
        config: the run's config.
        directory: the run's output folder.
        first_step: the step that the run continues from. Later records are removed so that no step
            appears twice. 0 starts new files.

    Raises:
        UserError: wandb is requested but not installed.
    """
    writers = [MetricsWriter()]
    with ExitStack() as stack:
        on_first(lambda: writers.append(_open(config, directory, first_step, stack)))
        yield writers[-1]


def _open(config: RunConfig, directory: Path, first_step: int, stack: ExitStack) -> MetricsWriter:
    path = directory / FILE
    _keep_until(path, first_step)
    file = stack.enter_context(closing(Lines(path)))
    tensorboard = wandb = None
    if "tensorboard" in config.training.report_to:
        purge = first_step + 1 if first_step else None
        tensorboard = stack.enter_context(closing(TensorBoard(directory / "tensorboard", purge)))
    if "wandb" in config.training.report_to:
        wandb = _import_wandb().init(
            name=config.training.run_name,
            config=config.model_dump(),
            dir=str(directory),
            id=_wandb_id(directory / "wandb_id", first_step),
            resume="allow",
        )
        stack.callback(wandb.finish)
    return MetricsWriter(file, tensorboard, wandb)


def read_evaluations(directory: Path) -> dict[int, dict[str, float]]:
    """Evaluations in metrics.jsonl, keyed by step; the first process reads for all."""

    def read() -> list[tuple[int, dict[str, float | None]]]:
        records = map(json.loads, (directory / FILE).read_text(encoding="utf-8").splitlines())
        return [(record.pop("step"), record) for record in records if "eval_loss" in record]

    # What was not finite is null in the file.
    return {
        step: {name: math.nan if value is None else value for name, value in record.items()}
        for step, record in on_first(read)
    }


def _keep_until(path: Path, first_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if first_step and json.loads(line)["step"] <= first_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # damaged, or the run was killed while writing this line
    lora_flax.write_atomically(path, "".join(kept))


def _wandb_id(path: Path, first_step: int) -> str:
    """The run's wandb id; a resumed run continues its own curves."""
    if not first_step or not path.exists():
        lora_flax.write_atomically(path, uuid.uuid4().hex[:8])
    return path.read_text()


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuse trackers that cannot be used, before anything is loaded; on the first process.

    Raises:
        UserError: wandb is requested but not installed, or has no valid API key.
    """
    if "wandb" in report_to:
        on_first(_check_wandb)


def _check_wandb() -> None:
    wandb = _import_wandb()
    if wandb.setup().settings.mode != "online":
        return
    try:
        problem = "" if wandb.login(prompt=False) else "no API key"
    except wandb.errors.Error as error:
        problem = str(error).splitlines()[0]
    if problem:
        raise UserError(
            f"training.report_to: wandb cannot be used ({problem}): run `wandb login`, or set "
            "WANDB_API_KEY or WANDB_MODE=offline"
        )


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "training.report_to: wandb is not installed: pip install 'phi3-jax[wandb]'"
        ) from None


def eval_record(found: HeldOutMetrics) -> dict[str, float]:
    """Held-out metrics under their names in metrics.jsonl."""
    return {
        "eval_loss": found.loss,
        "eval_perplexity": found.perplexity,
        "eval_mean_token_accuracy": found.token_accuracy,
    }


def step_record(metrics: StepMetrics, learning_rate: float, epoch: float) -> dict[str, float]:
    """The part of a step's record that `Window.take` does not provide."""
    return {
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": learning_rate,
        "epoch": epoch,
    }


class Window:
    """Running sums over the steps since the last log line."""

    def __init__(self) -> None:
        self._reset()
        self.start()

    def start(self) -> None:
        """Restart the clock, so that time spent outside training does not count."""
        self._last = time.monotonic()

    def add(self, metrics: StepMetrics, batch: Batch) -> None:
        """Add a step and the time since the previous one; a skipped step adds only its tokens."""
        if metrics.finite:
            targets = float(metrics.target_tokens)
            self._nll += float(metrics.loss) * targets
            self._correct += float(metrics.accuracy) * targets
            self._targets += targets
        self._tokens += int((batch["segment_ids"] > 0).sum())
        self._slots += batch["segment_ids"].size
        now = time.monotonic()
        self._seconds += now - self._last
        self._last = now

    @property
    def tokens_per_second(self) -> float:
        """Non-padding tokens per second of training, excluding evaluation and saving."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def take(self) -> dict[str, float]:
        """Return means over the window's targets (if any), speed and padding share; then reset."""
        record = {}
        if self._targets:
            record["loss"] = self._nll / self._targets
            record["mean_token_accuracy"] = self._correct / self._targets
        record["tokens_per_second"] = self.tokens_per_second
        record["padding"] = 1 - self._tokens / max(1, self._slots)
        self._reset()
        return record

    def _reset(self) -> None:
        self._nll = self._correct = self._targets = 0.0
        self._tokens, self._slots, self._seconds = 0, 0, 0.0
