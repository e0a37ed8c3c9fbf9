"""Every state in which a crash can leave a folder.

The folder is copied before every file operation that Python sees. Each copy is what a process
leaves that is killed there; with a file cut short, it is what a machine leaves that loses its
power.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


class Recorder:
    """Copies a folder before each operation on it; a copy that equals the last one is dropped."""

    def __init__(self, folder: Path, copies: Path):
        self.folder, self.copies, self.on = folder, copies, False
        self.states: list[Path] = []
        self._seen: set[str] = set()
        sys.addaudithook(self._before)  # stays until the process ends

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Copy in this context, and once more at its end."""
        self.on = True
        yield
        self.on = False
        self.copy()

    def _before(self, event: str, arguments: tuple) -> None:
        if not self.on or event not in OPERATIONS or str(self.folder) not in str(arguments[0]):
            return
        self.on = False
        self.copy()
        self.on = True

    def copy(self) -> None:
        """Copy the folder, again if another thread removed or renamed a file meanwhile."""
        target = self.copies / str(len(self.states))
        while True:
            try:
                digest = self._digest()
                if digest not in self._seen:
                    shutil.copytree(self.folder, target)
                break
            except (FileNotFoundError, shutil.Error):
                shutil.rmtree(target, ignore_errors=True)
        if digest not in self._seen:
            self._seen.add(digest)
            self.states.append(target)

    def _digest(self) -> str:
        files = sorted(path for path in self.folder.rglob("*"))
        about = [(str(p), p.read_bytes() if p.is_file() else b"") for p in files]
        return hashlib.sha256(repr(about).encode()).hexdigest()


def states_of(folder: Path, work: Callable[[], object]) -> list[Path]:
    """The states of a folder, which is made here, while something is written into it."""
    folder.mkdir()
    recorder = Recorder(folder, folder.with_name(f"{folder.name}-states"))
    with recorder.recording():
        work()
    return recorder.states


def with_torn(states: list[Path], dice: Random) -> Iterator[tuple[Path, bool]]:
    """Copies of the states, and of each one more with a file cut short (True)."""
    for state in states:
        for torn in (False, True):
            copy = state.with_name(f"{state.name}-{'torn' if torn else 'whole'}")
            shutil.copytree(state, copy)
            files = sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)
            if torn and files:
                file = files[dice.randrange(len(files))]
                file.write_bytes(file.read_bytes()[: dice.randrange(file.stat().st_size)])
            yield copy, torn
