"""Terminal output of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from phi3_jax.errors import printable
from phi3_jax.training.interrupt import drop_closed_output


class _Console(Console):
    """A console that a run outlives: its terminal or pipe may be closed while it trains."""

    def on_broken_pipe(self) -> None:
        """Print nowhere from now on; rich would exit."""
        drop_closed_output()

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print, unless nobody can read it any more."""
        try:
            super().print(*objects, **settings)
        except OSError:  # the terminal is gone
            drop_closed_output()


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere; the bar is shown inside a `with` block.

    Args:
        total_steps: total steps of the run.
        first_step: steps already done.
        quiet: print nothing.
    """

    def __init__(self, total_steps: int, first_step: int, quiet: bool = False):
        self.console = _Console(highlight=False, quiet=quiet)
        self._total, self._first, self._quiet = total_steps, first_step, quiet
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Terminal:
        self._started = time.monotonic()
        if self.console.is_terminal and not self._quiet:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "training", total=self._total, completed=self._first, shown=""
            )
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

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
        self.console.print(printable(text), markup=False, soft_wrap=True)


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.4f}"
