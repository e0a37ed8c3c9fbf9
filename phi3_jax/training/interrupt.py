"""SIGINT, SIGTERM and SIGHUP: a run in training saves a checkpoint; everything else ends at once.

`handle_signals` covers a whole command, from before JAX is imported, which is why this module
imports nothing heavy. Python runs a handler in the main thread only, between two bytecodes: while
JAX starts or compiles, or where a library catches the exception, it would be late or lost. A thread
of this module therefore ends a process that is still running a few seconds after such a signal.

A module written in C may crash the process if an exception interrupts its initialization (jaxlib's
call `abort`), so a signal that arrives meanwhile is delivered once it is imported.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any

from phi3_jax.errors import printable

NUMBERS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
# How long a command that was told to end at once may take to clean up.
GRACE_SECONDS = 5.0
# How soon a signal that could not be delivered is tried again.
RETRY_SECONDS = 0.05


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A signal stopped the run; it can be resumed if a step was taken."""

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        if step:
            said = f"after step {step}; a checkpoint was saved, and --resume continues from it"
        else:
            said = "before the first step; there was nothing to save"
        super().__init__(f"stopped by {name} {said}")
        self.signum = signum


class Stopped(KeyboardInterrupt):
    """A signal ended the command at once."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Signals:
    """The signals that a process received, and what the next one does.

    Attributes:
        stopped: the signal that ended the command at once, if one did.
        received: signals since `collect_signals` that leave time to save.
        joined: whether this process is one of several. JAX then handles SIGTERM, and a signal that
            leaves time to save is passed on to it, so that all processes stop after one step.
        postponed: a signal that could not end the command when it arrived; it is sent again.
    """

    def __init__(self, command: str, interactive: bool = False) -> None:
        self.command = command
        self.interactive = interactive
        self.stopped: int | None = None
        self.received: list[int] = []
        self.joined = False
        self.postponed: int | None = None
        self._collecting = False
        # Signals that arrived, and those of them that the main thread has handled.
        self._arrived = self._handled = 0

    def collect(self, on: bool) -> None:
        """Whether the next signal leaves time to save."""
        self.received, self._collecting = [], on

    def _leaves_time(self) -> bool:
        return (self._collecting or self.joined) and not self.received

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The handler, run by Python in the main thread."""
        if signum == getattr(signal, "SIGHUP", None):
            drop_closed_output()
        self._handled += 1
        if self._leaves_time():
            self.received.append(signum)
            if self.joined:
                os.kill(os.getpid(), signal.SIGTERM)
            say("finishing the step and saving a checkpoint; repeat to stop immediately")
            return
        if _imports_extension(frame):
            self.postponed = signum
            return
        if self.interactive and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopped = signum
        raise Stopped(signum)

    def watch(self, pipe: socket.socket) -> None:
        """End the process if the main thread does not; runs in a thread until the pipe closes."""
        deadline = 0.0
        while True:
            if select.select([pipe], [], [], RETRY_SECONDS if deadline else None)[0]:
                data = pipe.recv(1)
                if not data:
                    break
                if data[0] in NUMBERS:
                    self._arrived, last = self._arrived + 1, data[0]
                    deadline = deadline or time.monotonic() + GRACE_SECONDS
                continue
            if time.monotonic() < deadline:
                if self.postponed is not None:
                    number, self.postponed = self.postponed, None
                    _send_to_main_thread(number)
                continue
            if self._is_ignored():
                number = self.stopped or last
                say(f"phi3-jax {self.command}: stopped by {signal.Signals(number).name}")
                os._exit(128 + number)
            deadline = 0.0
        pipe.close()

    def _is_ignored(self) -> bool:
        """Whether the main thread should have ended the command by now."""
        if self.stopped is not None or self.postponed is not None:
            return True
        waiting = self._arrived - self._handled
        return waiting > 1 or (waiting == 1 and not self._leaves_time())


def _send_to_main_thread(number: int) -> None:
    thread = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and thread is not None:
        signal.pthread_kill(thread, number)  # also wakes it from a system call
    else:
        signal.raise_signal(number)


def _imports_extension(frame: FrameType | None) -> bool:
    """Whether a module written in C is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            loader = getattr(frame.f_locals.get("spec"), "loader", None)
            if isinstance(loader, ExtensionFileLoader):
                return True
        frame = frame.f_back
    return False


_current: Signals | None = None


@contextmanager
def handle_signals(command: str, interactive: bool = False) -> Iterator[Signals]:
    """Handle signals while the command runs, and restore the previous handlers at the end.

    SIGHUP stays ignored under `nohup`. Python handles signals only in the main thread; in any other
    thread this changes nothing.

    Args:
        command: its name, for messages.
        interactive: SIGINT is a plain KeyboardInterrupt, which the command may catch to continue.
    """
    global _current
    signals = Signals(command, interactive)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    outer, _current = _current, signals
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = {
        number: signal.signal(number, signals.handle)
        for number in NUMBERS
        if not (number == getattr(signal, "SIGHUP", None) and _under_nohup())
    }
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook, sys.excepthook = _silent_hooks(signals, *hooks)
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=signals.watch, args=(ours,), daemon=True).start()
    try:
        yield signals
    finally:
        sys.unraisablehook, sys.excepthook = hooks
        signal.set_wakeup_fd(wakeup)
        theirs.close()
        for number, handler in before.items():
            if handler is not None:  # None: installed by a library in C
                signal.signal(number, handler)
        _current = outer


def _silent_hooks(
    signals: Signals, unraisable: Callable[[Any], object], uncaught: Callable[..., object]
) -> tuple[Callable[[Any], object], Callable[..., object]]:
    """The two hooks, printing no traceback of what Python or C code ignores and we say ourselves.

    That is a `Stopped` in callbacks, such as the garbage collector's, which is lost there and sent
    again. It is also what tensorstore's threads raise when Orbax gave up saving after the first
    array that could not be written.
    """

    def is_said(error: Any) -> bool:
        if isinstance(error, Stopped):
            signals.postponed = error.signum
            return True
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    def print_others(about: Any) -> None:
        if not is_said(about.exc_value):
            unraisable(about)

    def print_other_errors(kind: Any, value: Any, traceback: Any) -> None:
        if not is_said(value):
            uncaught(kind, value, traceback)

    return print_others, print_other_errors


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect signals so the current step can finish and be saved; a second one stops at once."""
    with contextlib.nullcontext(_current) if _current else handle_signals("train") as signals:
        if not signals.joined:
            signals.collect(True)
        try:
            yield signals.received
        finally:
            if not signals.joined:
                signals.collect(False)


def end_at_once() -> None:
    """From now on a signal ends the command at once: all that training made is saved.

    The processes of one run stop together, so a run of several continues to its end.

    Raises:
        Stopped: a signal arrived before, in time to be told.
    """
    if _current is None or _current.joined:
        return
    received = _current.received
    _current.collect(False)
    if received:
        _current.stopped = received[0]
        raise Stopped(received[0])


def pass_on_signals() -> None:
    """From now on a signal stops all processes of the run after the same step, as SIGTERM does."""
    if _current is not None:
        _current.joined = True


def _under_nohup() -> bool:
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def say(line: str) -> None:
    """Write a line to standard error, wherever the program is (print may be interrupted itself)."""
    try:
        os.write(2, f"\n{line}\n".encode())
    except OSError:
        drop_closed_output()


def report(line: str) -> None:
    """Print a line to standard error, if anyone can still read it."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        drop_closed_output()


def drop_closed_output() -> None:
    """Send standard output and error nowhere, where the terminal or pipe behind them is gone.

    Otherwise the next line printed would end a run that is about to save.
    """
    if not hasattr(select, "poll"):
        return
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, select.POLLOUT)
    closed = [n for n, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in closed:
        os.dup2(nowhere, number)
    os.close(nowhere)
