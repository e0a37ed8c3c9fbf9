"""One run owns its output folder: a second one is refused, and says who holds it.

On a local disk the lock is `flock`, which the kernel frees when its holder dies. Network folders
do not all pass that on to other hosts, so there the lock is a lease: a file that its holder renews.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import lora_flax
from phi3_jax.errors import UserError
from phi3_jax.training.interrupt import report

FILE = ".lock"
RENEW_SECONDS = 10.0
LEASE_SECONDS = 60.0
# How long a new lease is left alone before its file is read again: another run may have written its
# own at the same moment, and the last one written counts.
SETTLE_SECONDS = 2.0
_LAST_SECOND = 2**33  # in the year 2242
NETWORK = ("nfs", "cifs", "smb", "lustre", "ceph", "glusterfs", "gpfs", "beegfs", "afs", "fuse.")


class LeaseFile(Protocol):
    """Where a lease is kept: `name` is that of its folder, for messages."""

    name: str

    def read(self) -> bytes | None:
        """The content; None if the file does not exist."""

    def write(self, content: bytes) -> None:
        """Replace the content as a whole."""

    def remove(self) -> None:
        """Delete the file."""


class _LocalFile:
    def __init__(self, folder: Path):
        self.name, self._path = str(folder), folder / FILE

    def read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def write(self, content: bytes) -> None:
        lora_flax.write_atomically(self._path, content)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class Lock:
    """The lock of a folder, held.

    Args:
        name: the folder, for messages.
    """

    def __init__(self, name: str):
        self.name, self._lost = name, threading.Event()

    def check(self) -> None:
        """Raise UserError if another run took the folder, because this one did not renew its lease.

        That happens to a process that was suspended or cut off from the disk.
        """
        if self._lost.is_set():
            raise UserError(
                f"{self.name}: this run was away for over {LEASE_SECONDS:.0f} s and another one "
                "took the folder; nothing more is written"
            )

    def renew(self, file: LeaseFile, own: dict[str, Any], ended: threading.Event) -> None:
        """Renew the lease until the run ends; runs in a thread."""
        while not ended.wait(RENEW_SECONDS):
            # A full disk or a network that is away: the next attempt may succeed.
            with contextlib.suppress(OSError, UserError):
                found = _parse(file.read())
                if found is not None and found.get("id") != own["id"]:
                    self._lost.set()
                    return
                _write(file, own)


@contextlib.contextmanager
def lock_folder(folder: Path, wait: bool) -> Iterator[Lock]:
    """Hold the lock of a folder.

    Args:
        folder: an existing folder.
        wait: if there is a lease, wait until it has expired or been renewed.

    Raises:
        UserError: another run holds the lock.
        OSError: the folder is not writable.
    """
    flock = sys.platform != "win32" and is_local(folder)
    with _flock(folder) if flock else lease(_LocalFile(folder), wait) as lock:
        yield lock


def is_local(folder: Path) -> bool:
    """Whether the folder is on a disk of this machine, as far as the system says."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return True
    path = folder.resolve()
    best, kind = -1, ""
    for line in mounts:
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), found
    # Containers without root have fuse-overlayfs for their own disk.
    return not kind.startswith(NETWORK) or "overlay" in kind


@contextlib.contextmanager
def _flock(folder: Path) -> Iterator[Lock]:
    assert sys.platform != "win32"  # which has no fcntl
    import fcntl

    path = folder / FILE
    while True:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed below)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(_held(str(folder), _parse(path.read_bytes()))) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.sameopenfile(file.fileno(), (again := os.open(path, os.O_RDONLY))):
                os.close(again)
                break
            os.close(again)
        file.close()  # its holder removed the file in between
    # A child that outlives this process would otherwise keep the lock.
    os.register_at_fork(after_in_child=file.close)
    try:
        file.truncate(0)
        file.write(json.dumps(_holder()).encode())
        yield Lock(str(folder))
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


@contextlib.contextmanager
def lease(file: LeaseFile, wait: bool) -> Iterator[Lock]:
    """Hold a lease; the arguments and errors are those of `lock_folder`."""
    own = _holder() | {"id": uuid.uuid4().hex}
    found = _parse(file.read())
    if wait and found is not None and not _is_over(found):
        report(f"{_held(file.name, found)}; waiting to see whether it is renewed")
        # Never longer than a lease: another host's clock may be wrong.
        left = min(max(0.0, found["expires"] - time.time()), LEASE_SECONDS)
        time.sleep(left + RENEW_SECONDS / 2)
        before, found = found, _parse(file.read())
        if found == before:  # not renewed
            found = None
    if found is not None and not _is_over(found):
        raise UserError(_held(file.name, found))
    _write(file, own)
    time.sleep(SETTLE_SECONDS)
    if (found := _parse(file.read())) is None or found.get("id") != own["id"]:
        raise UserError(_held(file.name, found))
    lock, ended = Lock(file.name), threading.Event()
    thread = threading.Thread(target=lock.renew, args=(file, own, ended), daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError, UserError):
            if (found := _parse(file.read())) is not None and found.get("id") == own["id"]:
                file.remove()


def _holder() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pids": _pid_namespace(),
        "started": time.time(),
    }


def _write(file: LeaseFile, own: dict[str, Any]) -> None:
    file.write(json.dumps(own | {"expires": time.time() + LEASE_SECONDS}).encode())


def _parse(content: bytes | None) -> dict[str, Any] | None:
    """What a lock file says; None without one, or if it is damaged."""
    try:
        found = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("host"), str):
        return None
    if type(found.get("pid")) is not int or not 0 < found["pid"] < 2**31:
        return None
    # A clock that shows another century is as good as none.
    times = [found.get("started"), found.get("expires", 0)]
    return found if all(_is_time(time) for time in times) else None


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < _LAST_SECOND


def _is_over(lease: dict[str, Any]) -> bool:
    """Whether a lease has expired, or its holder, a process of this host, is dead."""
    if lease.get("expires", 0) < time.time():
        return True
    here = _holder()
    if any(lease.get(key) != here[key] for key in ("host", "pids")):
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    # A restarted container: its command has the same id again.
    return bool(lease["pid"] == here["pid"])


def _pid_namespace() -> str:
    """Containers of one host may share its name, and then have process ids of their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _held(folder: str, found: dict[str, Any] | None) -> str:
    who = "another run writes to this folder"
    if found is not None:
        who += f": process {found['pid']} on {found['host']}, started {_clock(found['started'])}"
        if "expires" in found:
            until = _clock(found["expires"])
            who += f"; it holds the folder until {until} and renews that while it runs"
    return f"{folder}: {who}. Wait until it ends, or choose another training.output_dir"


def _clock(seconds: float) -> str:
    when = datetime.datetime.fromtimestamp(seconds).astimezone()
    return when.isoformat(sep=" ", timespec="seconds")
