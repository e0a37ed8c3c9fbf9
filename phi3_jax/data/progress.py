"""The progress of tokenizing: a bar on a terminal, one line at the end elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from phi3_jax.sharding.processes import is_first

# What takes less is not worth a line.
SECONDS = 5


class TokenizingBar:
    """Rows done, rows per second, and the time left, inside a `with` block."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, quiet=not is_first())
        self._started = time.monotonic()
        self._done = 0
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> TokenizingBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif exception[0] is None and time.monotonic() - self._started > SECONDS:
            self.console.print(f"tokenized {self._done:,} rows ({self._speed():,.0f} rows/s)")

    def update(self, done: int, total: int) -> None:
        """Show how many rows are done."""
        self._done = done
        if not self.console.is_terminal or self.console.quiet:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("tokenizing"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]} rows/s"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("tokenizing", total=total, speed="")
            self._progress.start()
        self._progress.update(self._task, completed=done, speed=f"{self._speed():,.0f}")

    def _speed(self) -> float:
        return self._done / max(time.monotonic() - self._started, 1e-9)
