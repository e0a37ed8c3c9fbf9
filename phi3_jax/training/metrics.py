"""Where numbers go: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal."""

from __future__ import annotations

import importlib
import json
import math
import time
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import lora_flax
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import Batch
from phi3_jax.errors import UserError
from phi3_jax.evaluation.held_out import HeldOutMetrics
from phi3_jax.training.step import StepMetrics


class MetricsWriter:
    """Writes each record to metrics.jsonl and to the trackers in `training.report_to`.

    Args:
        config: the run's config.
        directory: the run's output folder.
        resumed_at: the step a resumed run continues from. Later records are removed so that no
            step appears twice. None starts a new file.

    Raises:
        UserError: wandb is requested but not installed.
    """

    def __init__(self, config: RunConfig, directory: Path, resumed_at: int | None):
        self._path = directory / "metrics.jsonl"
        _keep_until(self._path, resumed_at)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        self._wandb: Any = None
        if "tensorboard" in config.training.report_to:
            from tensorboardX import SummaryWriter

            purge = None if resumed_at is None else resumed_at + 1
            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)
        if "wandb" in config.training.report_to:
            self._wandb = _import_wandb().init(
                name=config.training.run_name,
                config=config.model_dump(),
                dir=str(directory),
                id=_wandb_id(directory / "wandb_id", resumed_at),
                resume="allow",
            )

    def write(self, step: int, record: dict[str, float]) -> None:
        """Write one record for a step; it is on disk when this returns.

        JSON cannot represent NaN or infinity: they are written as null and omitted from the curves.
        """
        finite = {name: value for name, value in record.items() if math.isfinite(value)}
        nulls = dict.fromkeys(record)
        self._file.write(json.dumps({"step": step} | nulls | finite) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Finite evaluations already on file, keyed by step; on resume, those before the stop."""
        records = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return {
            record.pop("step"): record for record in records if record.get("eval_loss") is not None
        }

    def close(self) -> None:
        """Close every sink."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def eval_record(found: HeldOutMetrics) -> dict[str, float]:
    """Held-out metrics under the names that they have in metrics.jsonl."""
    return {
        "eval_loss": found.loss,
        "eval_perplexity": found.perplexity,
        "eval_mean_token_accuracy": found.token_accuracy,
    }


class NoMetrics(MetricsWriter):
    """The writer of every process but the first: writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, record: dict[str, float]) -> None:
        pass

    def evaluations(self) -> dict[int, dict[str, float]]:
        return {}

    def close(self) -> None:
        pass


def _keep_until(path: Path, resumed_at: int | None) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if resumed_at is not None and json.loads(line)["step"] <= resumed_at:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the run was killed while it wrote this line
    lora_flax.write_atomically(path, "".join(kept))


def _wandb_id(path: Path, resumed_at: int | None) -> str:
    """The run's wandb id; a resumed run continues its own curves."""
    if resumed_at is None or not path.exists():
        lora_flax.write_atomically(path, uuid.uuid4().hex[:8])
    return path.read_text()


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "training.report_to: wandb is not installed: pip install 'phi3-jax[wandb]'"
        ) from None


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere.

    Args:
        total_steps: total steps of the run.
        first_step: steps already done.
        quiet: print nothing.
    """

    def __init__(self, total_steps: int, first_step: int, quiet: bool = False):
        self.console = Console(highlight=False, quiet=quiet)
        self._total = total_steps
        self._started, self._first = time.monotonic(), first_step
        self._progress: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "training", total=total_steps, completed=first_step, shown=""
            )
            self._progress.start()

    def step(self, step: int, record: dict[str, float]) -> None:
        """Show the latest step on the bar."""
        if self._progress is not None:
            shown = (
                f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
                f"{record['tokens_per_second']:,.0f} tokens/s"
            )
            self._progress.update(self._task, completed=step, shown=shown)

    def log(self, step: int, record: dict[str, float]) -> None:
        """Print a line with the whole record, plus the time left if there is no bar."""
        parts = [f"{name} {_number(value)}" for name, value in record.items()]
        if self._progress is None and step > self._first:
            left = (time.monotonic() - self._started) / (step - self._first) * (self._total - step)
            parts.append(f"left {int(left) // 60}:{int(left) % 60:02d}")
        self.print(f"step {step}/{self._total}  " + "  ".join(parts))

    def print(self, text: str) -> None:
        """Print a line of text, above the bar if there is one; no wrapping, no markup."""
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.4f}"


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
