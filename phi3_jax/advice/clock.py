"""The time a run will take, by steps that were measured."""

from __future__ import annotations

import time
from collections.abc import Hashable

# A single step says little where steps are short or their rows differ.
STEPS, SECONDS = 3, 1.0


class StepClock:
    """Estimates the time of a run's remaining steps, once, from the first measured ones.

    A step is dispatched before the one before it is read, and dispatching one of a new shape
    compiles it, so that time does not count. Neither does the first step, in which the device's
    memory is touched for the first time.

    Args:
        positions: mean positions of a step (rows times length), padding included.
    """

    def __init__(self, positions: float) -> None:
        self._mean = positions
        self._known: set[Hashable] = set()
        self._compiled = True  # since the last step that was read
        self._last: float | None = None
        self._steps, self._positions, self._seconds = 0, 0, 0.0
        self._done = False

    def dispatch(self, shape: Hashable) -> None:
        """A step with rows of this shape was dispatched."""
        if shape not in self._known:
            self._known.add(shape)
            self._compiled = True

    def pause(self) -> None:
        """The device did something else, such as an evaluation."""
        self._last = None

    def read(self, positions: int, left: int) -> str | None:
        """A step's metrics were read, so that it is over.

        Args:
            positions: the positions of its rows.
            left: steps left.

        Returns:
            The line to print, the first time that enough is known.
        """
        now = time.monotonic()
        if self._last is not None and not self._compiled:
            self._steps += 1
            self._positions += positions
            self._seconds += now - self._last
        self._last, self._compiled = now, False
        if self._done or not left or self._steps < STEPS or self._seconds < SECONDS:
            return None
        self._done = True
        step = self._seconds / self._positions * self._mean
        return (
            f"time: {left} steps left of about {step:.3g} s, {duration(step * left)} in all "
            f"(measured over {self._steps} steps; without compiling, evaluation, and saving)"
        )


def duration(seconds: float) -> str:
    """A time as a person would say it: `45 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
