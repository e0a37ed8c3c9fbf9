"""metrics.jsonl, its records, and the sums between log lines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax

import lora_flax
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import Batch
from phi3_jax.errors import UserError
from phi3_jax.evaluation.held_out import HeldOutMetrics
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.flops import lora_step_flops
from phi3_jax.peaks import peak_flops
from phi3_jax.report.folder import METRICS
from phi3_jax.sharding.processes import on_first
from phi3_jax.training.interrupt import report
from phi3_jax.training.step import StepMetrics
from phi3_jax.training.trackers import Tracker, open_tracker


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


class MetricsWriter:
    """Writes each record to all of its sinks; without sinks, writes nothing.

    Args:
        file: metrics.jsonl.
        trackers: those of `training.report_to`.
    """

    def __init__(self, file: Lines | None = None, trackers: Sequence[Tracker] = ()):
        self._file, self._trackers = file, trackers

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
        for tracker in self._trackers:
            tracker.add(step, finite)


@contextmanager
def open_metrics(
    config: RunConfig,
    directory: Path,
    first_step: int,
    warn: Callable[[str], None] = report,
) -> Iterator[MetricsWriter]:
    """Open metrics.jsonl and the trackers in `training.report_to`, and close them at the end.

    Only the first process writes; the others get a writer without sinks.

    Args:
        config: the run's config.
        directory: the run's output folder.
        first_step: the step that the run continues from. Later records are removed so that no step
            appears twice. 0 starts new files.
        warn: prints a line about a tracker that takes no more metrics.

    Raises:
        UserError: a tracker cannot be used.
    """
    writers = [MetricsWriter()]
    with ExitStack() as stack:
        on_first(lambda: writers.append(_open(config, directory, first_step, warn, stack)))
        yield writers[-1]


def _open(
    config: RunConfig,
    directory: Path,
    first_step: int,
    warn: Callable[[str], None],
    stack: ExitStack,
) -> MetricsWriter:
    path = directory / METRICS
    _keep_until(path, first_step)
    file = stack.enter_context(closing(Lines(path)))
    trackers = [
        stack.enter_context(closing(open_tracker(name, config, directory, first_step, warn)))
        for name in config.training.report_to
        if name != "none"
    ]
    return MetricsWriter(file, trackers)


def read_evaluations(directory: Path) -> dict[int, dict[str, float]]:
    """Evaluations in metrics.jsonl, keyed by step; the first process reads for all.

    Lines that are not records are skipped, as `open_metrics` does. Without a file there are none.
    """

    def read() -> list[tuple[int, dict[str, float | None]]]:
        records = _records(directory / METRICS)
        return [(record.pop("step"), record) for record in records if "eval_loss" in record]

    # What was not finite is null in the file.
    return {
        step: {name: math.nan if value is None else float(value) for name, value in record.items()}
        for step, record in on_first(read)
    }


def read_loss(directory: Path) -> float:
    """The last training loss in metrics.jsonl; NaN if there is none, or it was not finite.

    The first process reads for all.
    """

    def read() -> float | None:
        records = [r for r in _records(directory / METRICS) if "learning_rate" in r]
        return records[-1].get("loss") if records else None

    loss = on_first(read)
    return math.nan if loss is None else float(loss)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; a line that is none is skipped, such as one that a kill cut short."""
    if not path.exists():
        return
    if not path.is_file():  # a FIFO would never end
        raise UserError(f"{path}: not a regular file; move it away")
    # Not `splitlines`, which would also cut at characters that JSON strings may hold.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and all(map(_is_number, record.values())):
            if type(record.get("step")) is int:
                yield record


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _keep_until(path: Path, first_step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in _records(path) if first_step and record["step"] <= first_step]
    lora_flax.write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


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


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """What a step's arithmetic is counted by.

    Attributes:
        network: the base model's config.
        peak: FLOP/s of all devices together, if it is known.
    """

    network: Phi3Config
    peak: float | None

    @classmethod
    def on(cls, network: Phi3Config, devices: Sequence[jax.Device]) -> StepFlops:
        """The counter of a network on these devices."""
        peaks = [peak_flops(device.device_kind) for device in devices]
        known = [peak for peak in peaks if peak is not None]
        return cls(network, sum(known) if len(known) == len(peaks) else None)

    def of(self, batch: Batch) -> int:
        """Model FLOPs of a step with this batch `[A, B, S]`; see `lora_step_flops`."""
        positions, segments = batch["positions"], batch["segment_ids"]
        return lora_step_flops(self.network, positions, segments, batch["targets"])


class Window:
    """Running sums over the steps since the last log line.

    Args:
        flops: how to count a step's arithmetic; None leaves it out of the records.
    """

    def __init__(self, flops: StepFlops | None = None) -> None:
        self._count = flops
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
        self._flops += 0 if self._count is None else self._count.of(batch)
        now = time.monotonic()
        self._seconds += now - self._last
        self._last = now

    @property
    def tokens_per_second(self) -> float:
        """Non-padding tokens per second of training, excluding evaluation and saving."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def take(self) -> dict[str, float]:
        """Return means over the window's targets (if any), speed and padding share; then reset.

        `tflops_per_second` counts the model's own FLOPs, and `utilization` is their share of the
        devices' peak, where that is known.
        """
        record = {}
        if self._targets:
            record["loss"] = self._nll / self._targets
            record["mean_token_accuracy"] = self._correct / self._targets
        record["tokens_per_second"] = self.tokens_per_second
        if self._count is not None and self._seconds:
            speed = self._flops / self._seconds
            record["tflops_per_second"] = speed / 1e12
            if self._count.peak is not None:
                record["utilization"] = speed / self._count.peak
        record["padding"] = 1 - self._tokens / max(1, self._slots)
        self._reset()
        return record

    def _reset(self) -> None:
        self._nll = self._correct = self._targets = 0.0
        self._tokens, self._slots, self._flops, self._seconds = 0, 0, 0, 0.0
