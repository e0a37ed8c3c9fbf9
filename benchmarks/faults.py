"""A long campaign of faults: what a run loses when everything that can fail does.

    python benchmarks/faults.py                        # everything, about half an hour
    python benchmarks/faults.py --only fuzz --count 2000
    python benchmarks/faults.py --only cloud --minutes 600

Each line of the table is a kind of fault: how many were tried; how many were clear, which means
that the program continued with the right numbers, or said in one line what is wrong; and how many
lost work or were unclear, each of which is printed with the number that repeats it (`--seed`).

- fuzz: broken input at every boundary of the program (tests/faults/boundaries.py).
- crashes: a run's folder as a crash leaves it at every file operation of saving, with and without a
  file cut short; the run continues from it.
- signals: SIGINT, SIGTERM, SIGHUP and SIGKILL to a real run, each at several moments; the run
  continues and ends with the bytes of an undisturbed one.
- disks: a run on a disk that gets full, which is then enlarged; the same bytes (needs Linux and
  `unshare`).
- cloud: runs that scripts/supervise.sh starts again after kills at random moments, in folders and
  in an emulated bucket (extra `emulators`), until each ends with the bytes of an undisturbed one;
  every third one comes back with other devices each time, and ends with its losses.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Table:
    """Counts of what was tried, by kind of fault."""

    def __init__(self) -> None:
        self.tried: collections.Counter[str] = collections.Counter()
        self.clear: collections.Counter[str] = collections.Counter()

    def add(self, kind: str, problem: str) -> None:
        """Count one fault, and print what is wrong, if anything is."""
        self.tried[kind] += 1
        self.clear[kind] += not problem
        if problem:
            print(f"  {kind}: {problem}", flush=True)

    def print(self) -> None:
        print("\n| fault | tried | clear | lost |\n| --- | ---: | ---: | ---: |")
        for kind, tried in self.tried.items():
            print(f"| {kind} | {tried} | {self.clear[kind]} | {tried - self.clear[kind]} |")


def fuzz(table: Table, folder: Path, count: int, seed: int) -> None:
    """Broken input at every boundary, in this process."""
    from tests.faults import boundaries

    sound = boundaries.Sound(folder / "sound")
    for boundary in boundaries.BOUNDARIES:
        name = f"broken {boundary.__name__}"
        for number in range(seed, seed + count):
            with contextlib.redirect_stderr(io.StringIO()):  # warnings about damaged checkpoints
                problem = _failure(lambda b=boundary, n=number: b(Random(n), sound))
            table.add(name, problem and f"--seed {number}: {problem}")
            for left in sound.folder.glob("[0-9]*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def crashes(table: Table, folder: Path, count: int, seed: int) -> None:
    """A run's folder as a crash leaves it, at every file operation that saving does."""
    from tests.faults import test_crash_states as tests
    from tests.faults.recorder import states_of, with_torn

    run = folder / "run"

    def save() -> None:
        with tests.open_output(str(run), resume=False) as opened:
            with tests.Checkpoints(opened.checkpoints, tests.IDENTITY, 2, opened) as checkpoints:
                for step in (2, 4, 6, 8):  # `start_again` saves step 10
                    checkpoints.save(step, tests.state_of(step), {"eval_loss": 1 / step})
                    checkpoints.wait()

    states = states_of(run, save)
    for state, torn in with_torn(states, Random(seed)):
        kind = "power lost while saving" if torn else "killed while saving"
        with contextlib.redirect_stderr(io.StringIO()):
            problem = _failure(lambda here=state: tests.start_again(here))
        table.add(kind, problem and f"state {state.name}: {problem}")
        shutil.rmtree(state)


def _failure(function: Callable[[], object]) -> str:
    """The last line of the traceback of a function, and where it was raised."""
    try:
        function()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "/phi3_jax/" in f.filename or "/lora_flax/" in f.filename]
        where = (own or frames)[-1]
        text = " ".join(str(error).split())[:200]
        return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
    return ""


def _of_runs(name: str) -> Callable[..., None]:
    """A kind of fault_runs.py, which is imported once it is needed."""

    def start(table: Table, folder: Path, amount: float, seed: int) -> None:
        import fault_runs

        getattr(fault_runs, name)(table.add, folder, amount, seed)

    return start


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def main() -> None:
    """Run the kinds of faults that were asked for, and print the table."""
    kinds: dict[str, Callable[..., None]] = {"fuzz": fuzz, "crashes": crashes}
    kinds |= {name: _of_runs(name) for name in ("signals", "disks", "cloud")}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--count", type=int, default=300, help="inputs at each boundary")
    parser.add_argument("--minutes", type=float, default=10.0, help="of kills at random")
    parser.add_argument("--seed", type=int, default=0, help="the first input")
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    table = Table()
    try:
        for name in args.only:
            began = time.monotonic()
            with _folder() as folder:
                amount = args.minutes if name == "cloud" else args.count
                kinds[name](table, folder, amount, args.seed)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    finally:
        table.print()  # also after Ctrl-C


if __name__ == "__main__":
    main()
