"""On a signal, a run finishes its step, saves a checkpoint, and reports how to resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A signal stopped the run after a checkpoint was saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; a checkpoint was saved, "
            "and --resume continues from it"
        )
        self.signum = signum


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM so the current step can finish and be saved.

    The first signal restores the previous handlers, so a second one stops the process at once.
    Python handles signals only in the main thread; in any other thread nothing is collected.
    """
    received: list[int] = []
    if jax.process_count() > 1:  # JAX handles SIGTERM, see `processes.agree_to_stop`
        yield received
        return

    def handle(signum: int, frame: object) -> None:
        received.append(signum)
        # Not print: the handler may interrupt another print.
        os.write(2, b"\nfinishing the step and saving a checkpoint; repeat to stop immediately\n")
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
