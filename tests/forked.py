"""Python scripts in processes that are forked from one that has imported what they need.

A process of its own spends four seconds of CPU on imports, more than a tiny run takes.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, reduction
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.imported"])


class _Descriptor:
    """A file descriptor that a forked process gets a copy of."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self):
        return _received, (reduction.DupFd(self.number),)


def _received(descriptor) -> int:
    return descriptor.detach()


class Forked:
    """The part of `subprocess.Popen` that the tests use, for `command` [Python, script, ...]."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        cwd: Path | None = None,
        stdin=None,
        stdout=None,
        stderr=None,
    ):
        self.stdin = self.stdout = None
        theirs = []
        with contextlib.ExitStack() as given:
            if stdin == subprocess.PIPE:
                read, write = os.pipe()
                given.callback(os.close, read)
                self.stdin, stdin = os.fdopen(write, "w"), read
            if stdout == subprocess.PIPE:
                read, write = os.pipe()
                given.callback(os.close, write)
                self.stdout, stdout = os.fdopen(read), write
            for number, stream in enumerate((stdin, stdout, stderr)):
                if stream is not None:
                    number_of = stream if isinstance(stream, int) else stream.fileno()
                    theirs.append((number, _Descriptor(number_of)))
            arguments = (list(map(str, command[1:])), dict(env), str(cwd or ROOT), theirs)
            self._process = _CONTEXT.Process(target=_run, args=arguments)
            with _environment(PYTHONPATH=str(ROOT)):
                forkserver.ensure_running()
            self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        self.wait()
        for stream in (self.stdin, self.stdout):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def _environment(**values: str):
    before = dict(os.environ)
    os.environ.update(values)
    yield
    os.environ.clear()
    os.environ.update(before)


def _run(command: list[str], environment: dict[str, str], folder: str, files: list) -> None:
    """Be the process that `command` would be, up to its end."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, descriptor in files:
        os.dup2(descriptor, number)
    sys.stdin = open(0)
    jax.config.update(
        "jax_disable_most_optimizations", environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    )
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        # What a process does at its end, and a forked one of `multiprocessing` does not.
        threading._shutdown()
        atexit._run_exitfuncs()
