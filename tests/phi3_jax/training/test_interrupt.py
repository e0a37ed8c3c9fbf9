"""Signals: what each does at every moment of a command, as a user's shell would see it."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi3_jax.cli import main as cli
from phi3_jax.training import interrupt
from phi3_jax.training.interrupt import (
    GRACE_SECONDS,
    Interrupted,
    Stopped,
    collect_signals,
    handle_signals,
)
from tests.conftest import ROOT
from tests.phi3_jax.conftest import make_config, write_config

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# Catches everything, as libraries may; `collecting` as a run does.
DEAF = """
import sys, time
from phi3_jax.training import interrupt
interrupt.GRACE_SECONDS = 0.3
with interrupt.handle_signals("train"):
    said = False
    while True:
        try:
            said = said or print("ready", flush=True) is None
            time.sleep(60)
        except BaseException:
            pass
"""

# Sends SIGINT while jaxlib's module in C is being initialized: it defines an enumeration in Python.
AT_IMPORT = """
import enum, signal, sys
from phi3_jax.cli.main import main
def send(frame, event, _):
    caller = frame.f_back
    if (
        frame.f_code is enum.EnumType.__call__.__code__
        and "importlib" in caller.f_code.co_filename
        and caller.f_back.f_locals["self"].name.startswith("jaxlib.")
    ):
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)
sys.setprofile(send)
sys.exit(main(["train", "--config", "quickstart"]))
"""


@pytest.fixture
def start(popen):
    """Starts Python on one CPU device."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
    }  # fmt: skip

    def start(*arguments: str, **settings) -> subprocess.Popen:
        return popen([sys.executable, *arguments], env=environment, **settings)

    return start


def wait_until(pid: int, number: int, disposition: str) -> None:
    """Until a process catches (`SigCgt`) or ignores (`SigIgn`) a signal."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        mask = int(status.split(f"{disposition}:")[1].split()[0], 16)
        if mask >> (number - 1) & 1:
            return
        time.sleep(0.01)
    raise AssertionError(f"{pid} did not change what signal {number} does")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_at_once_or_after_the_step(number):
    before = signal.getsignal(number)
    with handle_signals("train") as signals:
        with pytest.raises(Stopped, match=number.name):
            os.kill(os.getpid(), number)
        assert signals.stopped == number
    with handle_signals("train"), collect_signals() as received:
        os.kill(os.getpid(), number)
        assert received == [number]
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_several_processes_stop_by_sigterm(monkeypatch):
    sent = []
    with handle_signals("train"):
        interrupt.pass_on_signals()
        handler = signal.getsignal(signal.SIGHUP)
        monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
        handler(signal.SIGHUP, None)
        with collect_signals() as received:
            assert received == [signal.SIGHUP]  # also before the first step
    assert sent == [signal.SIGTERM]


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_signals("train"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_in_a_chat_python_keeps_ctrl_c():
    with handle_signals("chat", interactive=True):
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
        assert not isinstance(caught.value, Stopped)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_chat_outlives_ctrl_c(monkeypatch):
    ended = []
    monkeypatch.setattr(interrupt, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(os, "_exit", ended.append)
    with handle_signals("chat", interactive=True):
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
    assert not ended


def test_messages_say_only_what_is_true():
    assert "checkpoint was saved" in str(Interrupted(signal.SIGTERM, 3))
    assert "nothing to save" in str(Interrupted(signal.SIGHUP, 0))


def test_a_program_that_catches_everything_ends_all_the_same(start):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start("-c", DEAF, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert process.stderr.read().strip() == "phi3-jax train: stopped by SIGTERM"


def test_a_signal_while_a_module_in_c_is_imported(start):
    """An exception there makes nanobind abort, with a core dump for a message."""
    process = start("-c", AT_IMPORT, text=True, stderr=subprocess.PIPE)
    assert process.wait(30) == 130
    assert process.stderr.read().strip() == "phi3-jax train: stopped by SIGINT"


def test_a_signal_that_a_callback_lost_is_sent_again():
    class Collected:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(GRACE_SECONDS)

    with handle_signals("train") as signals:
        Collected()
        assert signals.stopped == signal.SIGTERM  # and Python ignored the exception
        started = time.monotonic()
        with pytest.raises(Stopped, match="SIGTERM"):
            time.sleep(GRACE_SECONDS)
        assert time.monotonic() - started < GRACE_SECONDS


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("INTERNAL: KeyboardInterrupt")]
)
def test_exit_code_of_an_error_that_a_signal_became(monkeypatch, capsys, error):
    def run(argv, signals):
        signals.stopped = signal.SIGINT
        raise error

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "phi3-jax train: stopped by SIGINT\n"


def test_a_signal_while_the_program_starts(tmp_path, checkpoint, chats, start):
    """Nothing to save at any of these moments, one message, and the shell's exit code."""
    config = make_config(checkpoint, chats, tmp_path / "run", max_steps=100_000, save_steps=None)
    file = write_config(config, tmp_path / "config.yaml")
    for number, delay in ((signal.SIGINT, 0.1), (signal.SIGINT, 1.5), (signal.SIGHUP, 3.0)):
        log = tmp_path / "log.txt"
        with log.open("w") as out:
            arguments = [str(ROOT / "train.py"), "--config", str(file)]
            process = start(*arguments, stdout=out, stderr=out)
            wait_until(process.pid, signal.SIGHUP, "SigCgt")  # Python itself catches only SIGINT
            time.sleep(delay)
            process.send_signal(number)
            assert process.wait(30) == 128 + number, log.read_text()
        text = log.read_text()
        assert f"stopped by {number.name}" in text and "Traceback" not in text
        assert not list((tmp_path / "run").glob("checkpoints/*")) or "after step" in text


def test_ctrl_c_in_a_terminal_while_processes_start_to_tokenize(tmp_path, checkpoint, chats, start):
    """A terminal sends it to its processes, a scheduler to all of a job; only the run answers."""
    data = {"streaming": True, "dataset_num_proc": 2}
    config = make_config(checkpoint, chats, tmp_path / "run", data, save_steps=None)
    file = write_config(config, tmp_path / "config.yaml")
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        arguments = [str(ROOT / "train.py"), "--config", str(file)]
        process = start(*arguments, stdout=out, stderr=out, start_new_session=True)
        while len(pids := children(process)) < 2:
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        for pid in pids:
            wait_until(pid, signal.SIGINT, "SigIgn")
            os.kill(pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
    text = log.read_text()
    assert "stopped by SIGINT" in text and "Traceback" not in text


def children(process: subprocess.Popen) -> list[int]:
    found = []
    for thread in Path(f"/proc/{process.pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, thread.read_text().split())
    return found


@pytest.mark.slow
def test_the_terminal_goes_away(tmp_path, checkpoint, chats, start):
    """SIGHUP with a terminal that is closed: the run saves, ends with 129, and can be resumed."""
    config = make_config(checkpoint, chats, tmp_path / "run", max_steps=100_000, save_steps=50_000)
    file = write_config(config, tmp_path / "config.yaml")
    ours, theirs = pty.openpty()
    arguments = [str(ROOT / "train.py"), "--config", str(file)]
    process = start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    metrics = Path(config.training.output_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step": 3' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
        os.set_blocking(ours, False)
        try:
            os.read(ours, 65536)  # or the run would wait for its terminal
        except BlockingIOError:
            pass
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(saved.name) >= 3


def test_a_stop_in_a_callback_prints_no_traceback(capsys):
    class Collected:
        def __del__(self):
            raise Stopped(signal.SIGTERM)

    before = sys.excepthook
    with handle_signals("train"):
        Collected()
        try:
            raise Stopped(signal.SIGTERM)
        except Stopped as error:
            sys.excepthook(Stopped, error, error.__traceback__)  # as PyErr_Print does, in C
    assert capsys.readouterr().err == "" and sys.excepthook is before


def test_what_tensorstore_raises_after_a_failed_save_is_not_printed(capsys):
    """Its threads find Orbax's event loop closed; the run says what was wrong."""
    with handle_signals("train"):
        late, other = RuntimeError("Event loop is closed"), RuntimeError("other")
        sys.excepthook(RuntimeError, late, None)
        assert capsys.readouterr().err == ""
        sys.excepthook(RuntimeError, other, None)
        assert "other" in capsys.readouterr().err
