"""Which of two ways to multiply is faster on the current device, by measuring."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

# Required speedup of a kernel: smaller differences are within timing noise.
MARGIN = 1.05
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class MatmulChoice:
    """Timings on one layer.

    Attributes:
        rows: number of input rows.
        seconds: time of one multiplication, by `xla` and `pallas`; omits whichever could not run.
        problem: why the kernel could not run.
        what: what was timed, for messages.
    """

    rows: int
    seconds: dict[str, float]
    problem: str = ""
    what: str = "4-bit matmul"

    @property
    def kernel(self) -> str:
        """`pallas` if it is faster, otherwise `xla`."""
        pallas = self.seconds.get("pallas")
        return "pallas" if pallas and pallas * MARGIN < self.seconds["xla"] else "xla"

    def __str__(self) -> str:
        each = ", ".join(f"{name} {1e3 * s:.3f} ms" for name, s in self.seconds.items())
        problem = f"; pallas cannot run: {self.problem}" if self.problem else ""
        return f"{self.what} of {self.rows} rows: {self.kernel} ({each}{problem})"


def compare(
    what: str,
    rows: int,
    ways: dict[str, Callable[..., Any]],
    *args: Any,
    compiler_options: Mapping[str, str] | None = None,
) -> MatmulChoice:
    """Times each of `ways`, `xla` and `pallas`, on the same arguments.

    Raises:
        Exception: whatever `xla` raises; what `pallas` raises becomes the choice's `problem`.
    """
    seconds, problem = {}, ""
    for name, run in ways.items():
        try:
            options = dict(compiler_options or {})
            seconds[name] = _seconds(jax.jit(run, compiler_options=options), *args)
        except Exception as error:  # compilers raise many types of exceptions
            if name == "xla":
                raise
            problem = str(error).strip().splitlines()[0]
    return MatmulChoice(rows, seconds, problem, what)


def _seconds(run: jax.stages.Wrapped, *args: Any) -> float:
    """The best of several runs, excluding compilation."""
    compiled = run.lower(*args).compile()
    times = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - started)
    return min(times[1:])
