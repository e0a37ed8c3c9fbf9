"""Terminal output of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from phi3_jax.errors import printable
from phi3_jax.report.text import clock, fixed, three_digits
from phi3_jax.training.interrupt import drop_closed_output

# How a line shows each value, in this order, each as wide in every line. Values that are not named
# here follow with their own names. Where a terminal is too narrow for all of them, the ones with
# the highest numbers are left out.
_SHOWN: dict[str, tuple[int, Callable[[float], str]]] = {
    "loss": (0, lambda v: f"loss {fixed(v, 4):>8}"),
    "mean_token_accuracy": (5, lambda v: f"accuracy {v:6.1%}"),
    "eval_loss": (0, lambda v: f"held-out loss {fixed(v, 4)}"),
    "eval_perplexity": (0, lambda v: f"perplexity {fixed(v, 3)}"),
    "eval_mean_token_accuracy": (0, lambda v: f"accuracy {v:.1%}"),
    "grad_norm": (4, lambda v: f"grad norm {fixed(v, 3):>8}"),
    "learning_rate": (3, lambda v: f"lr {v:.2e}"),
    "epoch": (6, lambda v: f"epoch {v:.2f}"),
    "tokens_per_second": (1, lambda v: f"{v:>7,.0f} tokens/s"),
    "tflops_per_second": (2, lambda v: f"{three_digits(v):>5} TFLOP/s"),
    "utilization": (2, lambda v: f"{v:4.0%} of peak"),
    "padding": (7, lambda v: f"padding {v:4.0%}"),
}
_LAST = 8


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
        warned: called with each line that begins with `warning: `.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        quiet: bool = False,
        warned: Callable[[str], None] | None = None,
    ):
        self.console = _Console(highlight=False, quiet=quiet)
        self._total, self._first, self._quiet = total_steps, first_step, quiet
        self._warned = warned
        self._mark: tuple[int, float] | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Terminal:
        if self.console.is_terminal and not self._quiet:
            wide = self.console.width >= 120
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=40 if wide else None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                console=self.console,
                expand=not wide,
            )
            self._task = self._progress.add_task(
                "training", total=self._total, completed=self._first, shown=""
            )
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, step: int, record: Mapping[str, float]) -> None:
        """Note that a step is done, and show it on the bar."""
        if self._mark is None:
            self._mark = step, time.monotonic()
        if self._progress is not None:
            names = ("loss", "learning_rate", "tokens_per_second")
            parts = [_shown(name, record[name]) for name in names]
            parts = [" ".join(part.split()) for part in parts] + self._left(step)
            self._progress.update(self._task, completed=step, shown="  ".join(parts))

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Print a line with the record, and with the time left if there is no bar.

        A terminal gets what fits in its width, a file or pipe the whole record.
        """
        parts = [self._head(step)]
        room = math.inf if self._progress is None else self.console.width - len(parts[0])
        order = [*(name for name in _SHOWN if name in record), *record]
        texts = {name: _shown(name, record[name]) for name in order}
        kept = set()
        for name in sorted(texts, key=lambda name: _SHOWN[name][0] if name in _SHOWN else _LAST):
            if len(texts[name]) + 2 > room:
                break
            kept.add(name)
            room -= len(texts[name]) + 2
        parts += [text for name, text in texts.items() if name in kept]
        if self._progress is None and "tokens_per_second" in record:
            parts += self._left(step)
        self.print("  ".join(parts))

    def compare(self, step: int, measure: str, members: Mapping[str, float]) -> None:
        """Print a value of each member of a sweep, a line each.

        Args:
            step: steps taken.
            measure: the value's name in the records, such as `loss`.
            members: the values by the members' names.
        """
        for name, value in members.items():
            self.print(f"{self._head(step)}  {_shown(measure, value)}  {name}")

    def print(self, text: str) -> None:
        """Print a line of text, above the bar if there is one; no wrapping, no markup."""
        if self._warned is not None:
            for line in text.splitlines():
                if line.startswith("warning: "):
                    self._warned(line)
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def _head(self, step: int) -> str:
        return f"step {step:>{len(str(self._total))}}/{self._total}"

    def _left(self, step: int) -> list[str]:
        """The time left, once two steps are timed; the first one compiles and does not count."""
        if self._mark is None or step < self._mark[0] + 2 or step == self._total:
            return []
        first, since = self._mark
        each = (time.monotonic() - since) / (step - first)
        return [f"left {clock(each * (self._total - step))}"]


def _shown(name: str, value: float) -> str:
    if name in _SHOWN:
        return _SHOWN[name][1](value)
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {fixed(value, 4)}"
