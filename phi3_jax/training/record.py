"""What a run leaves for its report besides metrics and samples: run.json in its output folder.

It has one attempt for each start of the run, with the command, the hardware, the versions, where
the time went, the memory used so far at the end of each phase, and the warnings; and the data as
the last start found them.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform as system
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
from jax import monitoring

import lora_flax
from phi3_jax.report.folder import RECORD, read_run
from phi3_jax.report.text import clock
from phi3_jax.report.write import write_report
from phi3_jax.sharding.processes import is_first

# What XLA and JAX spend on making a program. Tracing is left out: its events nest.
_COMPILING = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_PACKAGES = (
    "phi3-jax jax jaxlib libtpu flax optax orbax-checkpoint numpy safetensors transformers "
    "huggingface-hub datasets"
).split()
# The largest share of a run's time that its reports in progress take.
_REPORT_SHARE = 0.05


class Record:
    """The record of a run in progress; every process measures, the first one writes.

    Its clock is always in one phase, so that the seconds of all phases add up to the run's.

    Args:
        folder: the run's output folder, also an attribute.
        command: the command line that started it, if there was one.
    """

    def __init__(self, folder: Path = Path(), command: str | None = None):
        self.folder = folder
        self._phase, self._since = "start", time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._earlier: list[dict[str, Any]] = []
        self._shared: dict[str, Any] = {}
        self._begun = False
        self._next_report = -math.inf
        self._attempt: dict[str, Any] = {
            "command": command,
            "started": _now(),
            "state": "running",
            "memory": {},
            "warnings": [],
        }

    def enter(self, phase: str) -> None:
        """End the current phase and start another."""
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        self._attempt["memory"][self._phase] = _peak_memory()
        self._phase, self._since = phase, now

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase within another one, which resumes afterwards."""
        outer = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def compiled(self, seconds: float) -> None:
        """Count time of the current phase as compiling."""
        self._seconds["compiling"] += seconds
        self._seconds[self._phase] -= seconds

    def warn(self, text: str) -> None:
        """Keep a warning for the report."""
        if text not in self._attempt["warnings"]:
            self._attempt["warnings"].append(text)

    def begin(self, first_step: int, total_steps: int, facts: dict[str, Any]) -> None:
        """Start the file, once the run is known to be able to train.

        Args:
            first_step: steps that earlier attempts took; 0 forgets these attempts.
            total_steps: steps of the whole run.
            facts: JSON values about its data and model.
        """
        self._attempt |= {
            "first_step": first_step,
            "step": first_step,
            "hardware": _hardware(),
            "versions": _versions(),
        }
        self._shared = {"total_steps": total_steps} | facts
        if first_step and is_first():
            self._earlier = read_run(self.folder).attempts
        self._begun = True
        self.write(first_step)

    def exports(self, step: int) -> None:
        """Keep which step the run exports."""
        self._shared["exported_step"] = step

    def write(self, step: int, state: str = "running") -> None:
        """Write run.json, on the first process; before `begin` nothing is written.

        Args:
            step: steps taken so far.
            state: `running`, `finished`, or why the run stopped.

        Raises:
            OSError: it cannot be written.
        """
        self.enter(self._phase)
        if not (self._begun and is_first()):
            return
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        self._attempt |= {"step": step, "state": state, "ended": _now(), "seconds": seconds}
        text = json.dumps(self.as_dict(), indent=1) + "\n"
        lora_flax.write_atomically(self.folder / RECORD, text)

    def report(self, step: int) -> None:
        """Write run.json and report.html of the run in progress: a run that is killed leaves them.

        Where the last one took more than a twentieth of the time since, it is left out. One that
        cannot be made is left to `end`, which says why.

        Raises:
            OSError: run.json cannot be written.
        """
        started = time.monotonic()
        if not (self._begun and is_first()) or started < self._next_report:
            return
        with self.during("reports"):
            self.write(step)
            try:
                write_report([self.folder])
            except Exception:  # matplotlib's are many
                self._next_report = math.inf
                return
        now = time.monotonic()
        self._next_report = now + (now - started) / _REPORT_SHARE

    def as_dict(self) -> dict[str, Any]:
        """What run.json holds."""
        return {"attempts": [*self._earlier, self._attempt], **self._shared}

    def end(self, state: str = "finished") -> str:
        """Write run.json for the last time, and report.html; before `begin` neither.

        Args:
            state: why the run ended.

        Returns:
            A line to print about the report.

        Raises:
            OSError: run.json cannot be written. A report that cannot be made is only a warning.
        """
        if not self._begun:
            return "no report: the run did not get as far as training"
        self.write(self._attempt["step"], state)
        if not is_first():
            return "report: written by the first process"
        try:
            return f"report: {write_report([self.folder])}"
        except Exception as error:  # matplotlib's are many
            return f"warning: no report could be written ({type(error).__name__}: {error})"

    def summary(self) -> str:
        """One line: the time since the start, goodput, and where the rest of the time went."""
        self.enter(self._phase)
        total = sum(self._seconds.values())
        others = sorted(
            ((s, name) for name, s in self._seconds.items() if name != "steps" and s >= 0.5),
            reverse=True,
        )
        rest = "".join(f", {name} {clock(s)}" for s, name in others)
        share = self._seconds["steps"] / max(total, 1e-9)
        return f"wall time {clock(total)}: goodput {share:.0%} (steps){rest}"


@contextlib.contextmanager
def open_record(folder: Path, command: str | None) -> Iterator[Record]:
    """The record of a run, which is written when the block ends, whatever ends it.

    Only an interrupt that leaves no time writes nothing.

    Args:
        folder: the run's output folder, also an attribute.
        command: the command line that started it, if there was one.
    """
    record = Record(folder, command)

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _COMPILING:
            record.compiled(duration_secs)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        with _hear_warnings(record.warn):
            yield record
    except Exception as error:
        # What ended the run may keep this from being written, too.
        with contextlib.suppress(OSError):
            record.end((str(error).splitlines() or [type(error).__name__])[0])
        raise
    finally:
        monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def _hear_warnings(heard: Callable[[str], None]) -> Iterator[None]:
    """Python's warnings are shown as before and heard as well."""
    show = warnings.showwarning

    def show_and_hear(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        heard(f"warning: {message}")
        show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_and_hear
    try:
        yield
    finally:
        warnings.showwarning = show


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _peak_memory() -> dict[str, int]:
    """Largest use so far in bytes: of this process's memory, and of its fullest device."""
    found = {}
    with contextlib.suppress(ImportError):  # Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["host"] = peak * (1 if sys.platform == "darwin" else 1024)
    stats = [device.memory_stats() or {} for device in jax.local_devices()]  # none on a CPU
    if peaks := [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]:
        found["device"] = max(peaks)
    return found


def _hardware() -> dict[str, Any]:
    device = jax.local_devices()[0]  # of another process, it would not tell its memory
    limit = (device.memory_stats() or {}).get("bytes_limit")
    memory = None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "devices": jax.device_count(),
        "device": device.device_kind,
        "platform": device.platform,
        "device_memory": limit,
        "processes": jax.process_count(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory": memory,
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return system.processor() or system.machine()


def _versions() -> dict[str, str]:
    found = {"python": system.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
