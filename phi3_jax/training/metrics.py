"""Metric sinks: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import math
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import lora_flax
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import Batch
from phi3_jax.errors import UserError
from phi3_jax.evaluation.held_out import HeldOutMetrics
from phi3_jax.sharding.processes import on_first
from phi3_jax.training.step import StepMetrics

FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes each record to all of its sinks; without sinks, writes nothing.

    Args:
        file: metrics.jsonl, open for appending.
        tensorboard: a `SummaryWriter`.
        wandb: a wandb run.
    """

    def __init__(self, file: TextIO | None = None, tensorboard: Any = None, wandb: Any = None):
        self._file, self._tensorboard, self._wandb = file, tensorboard, wandb

    def write(self, step: int, record: dict[str, float]) -> None:
        """Write one record for a step; it is on disk when this returns.

        JSON cannot represent NaN or infinity: they are written as null and omitted from the curves.
        """
        finite = {name: value for name, value in record.items() if math.isfinite(value)}
        if self._file is not None:
            nulls = dict.fromkeys(record)
            self._file.write(json.dumps({"step": step} | nulls | finite) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
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
    file = stack.enter_context(path.open("a", encoding="utf-8"))
    tensorboard = wandb = None
    if "tensorboard" in config.training.report_to:
        from tensorboardX import SummaryWriter

        purge = first_step + 1 if first_step else None
        tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)
        stack.callback(tensorboard.close)
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
    """Finite evaluations in metrics.jsonl, keyed by step; the first process reads for all."""

    def read() -> list[tuple[int, dict[str, float]]]:
        lines = (directory / FILE).read_text(encoding="utf-8").splitlines()
        return [
            (r.pop("step"), r) for r in map(json.loads, lines) if r.get("eval_loss") is not None
        ]

    return dict(on_first(read))


def _keep_until(path: Path, first_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if first_step and json.loads(line)["step"] <= first_step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the run was killed while writing this line
    lora_flax.write_atomically(path, "".join(kept))


def _wandb_id(path: Path, first_step: int) -> str:
    """The run's wandb id; a resumed run continues its own curves."""
    if not first_step or not path.exists():
        lora_flax.write_atomically(path, uuid.uuid4().hex[:8])
    return path.read_text()


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
