"""One run owns its folder: `flock` on a local disk, a lease elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from phi3_jax import UserError
from phi3_jax.training import lock
from phi3_jax.training.lock import is_local, lock_folder
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from phi3_jax.training import lock
if len(sys.argv) > 2:
    lock.is_local = lambda folder: False
    lock.SETTLE_SECONDS = lock.RENEW_SECONDS = 0.1
    lock.LEASE_SECONDS = float(sys.argv[2])
with lock.lock_folder(Path(sys.argv[1]), wait=False):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def leases(monkeypatch):
    """Leases instead of `flock`, with short times."""
    monkeypatch.setattr(lock, "is_local", lambda folder: False)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)


@pytest.fixture
def hold(popen):
    """Starts a process that holds the lock of a folder."""

    def start(folder, *arguments: str, code: str = HOLD) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(folder), *arguments]
        process = popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout.readline() == "held\n"
        return process

    return start


def test_a_second_process_is_refused_and_a_dead_one_does_not_block(tmp_path, hold):
    other = hold(tmp_path)
    with pytest.raises(UserError, match=rf"process {other.pid} on .*, started 20.*Wait until"):
        with lock_folder(tmp_path, wait=True):
            pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with lock_folder(tmp_path, wait=False):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_child_does_not_keep_the_lock(tmp_path, hold):
    child = "os.fork() or (print('forked', flush=True), time.sleep(60))\n    os._exit(0)"
    process = hold(tmp_path, code="import os\n" + HOLD.replace("time.sleep(60)", child))
    assert process.stdout.readline() == "forked\n"
    process.wait()
    with lock_folder(tmp_path, wait=False):
        pass


def test_a_lease_is_renewed_and_says_until_when(tmp_path, leases, hold):
    other = hold(tmp_path, "0.5")
    time.sleep(0.7)  # longer than one lease
    for wait in (False, True):
        with pytest.raises(UserError, match=rf"{other.pid} on .* holds the folder until 20"):
            with lock_folder(tmp_path, wait=wait):
                pass
    other.kill()
    other.wait()


def test_a_lease_that_nobody_renews_expires(tmp_path, leases):
    left = {"host": "other", "pid": 1, "pids": "x", "started": 1.0, "id": "a"}
    (tmp_path / ".lock").write_text(json.dumps(left | {"expires": time.time() + 0.4}))
    with pytest.raises(UserError, match="process 1 on other"):
        with lock_folder(tmp_path, wait=False):
            pass
    with lock_folder(tmp_path, wait=True):
        pass
    (tmp_path / ".lock").write_text("{dam")
    with lock_folder(tmp_path, wait=False):
        pass


def test_the_lease_of_a_dead_process_of_this_host_is_over(tmp_path, leases, hold):
    other = hold(tmp_path, "60")
    other.kill()
    other.wait()
    assert json.loads((tmp_path / ".lock").read_text())["expires"] > time.time() + 30
    with lock_folder(tmp_path, wait=False):
        pass


def test_a_run_that_lost_its_lease_writes_nothing_more(tmp_path, leases):
    with lock_folder(tmp_path, wait=False) as held:
        held.check()
        file = tmp_path / ".lock"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"id": "another"}))
        time.sleep(0.4)
        with pytest.raises(UserError, match="another one took the folder"):
            held.check()
    assert json.loads(file.read_text())["id"] == "another"


def test_network_folders_are_known_by_their_mount(tmp_path, monkeypatch):
    assert is_local(tmp_path)
    mounts = f"/dev/a / ext4 rw 0 0\nhost:/x {tmp_path} nfs4 rw 0 0\n"
    monkeypatch.setattr(lock.Path, "read_text", lambda *_, **__: mounts)
    assert not is_local(tmp_path / "run") and is_local(tmp_path.parent)


@pytest.mark.parametrize(
    "odd",
    [
        {"pid": "1"}, {"pid": True}, {"pid": 0}, {"pid": -1}, {"pid": 2**70}, {"host": None},
        {"started": "now"}, {"started": 10**400}, {"expires": "soon"}, {"expires": [1]},
        {"expires": float("nan")}, {"expires": 1e300}, {"expires": 10**400},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_lease_does_not_block(tmp_path, leases, odd):
    found = {"host": "other", "pid": 1, "pids": "x", "started": 1.0, "id": "a"}
    found |= {"expires": time.time() + 100} | odd
    (tmp_path / ".lock").write_text(json.dumps(found))
    with lock_folder(tmp_path, wait=True):
        pass


def test_a_dead_holder_whose_clock_was_ahead_does_not_block(tmp_path, leases):
    left = {"host": "other", "pid": 1, "started": 1.0, "id": "a", "expires": time.time() + 1e6}
    (tmp_path / ".lock").write_text(json.dumps(left))
    with lock_folder(tmp_path, wait=True):  # after the time of a lease, in which nobody renewed it
        pass
