"""A run whose output folder is a bucket: it works in a local folder, and copies that at every save.

An object is written by one put, so nothing in the bucket is ever half a file. The record of a
checkpoint is put last: until then the checkpoint does not exist.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from phi3_jax.buckets import Bucket, Outage, Unanswered
from phi3_jax.training.interrupt import report
from phi3_jax.training.lock import FILE, Lock, lease
from phi3_jax.training.state_files import CHECKPOINTS, RECORD

T = TypeVar("T")

# How long a run waits for a bucket that stopped answering, and the longest pause between requests.
OUTAGE_SECONDS = 600.0
PAUSE_SECONDS = 30.0
# Folders of a run, or of a sweep's member, that are written anew when it is resumed, or only added
# to.
_NOT_READ = {"adapter", "tensorboard", "profile"}
_RECORD_NAME = re.compile(rf"{CHECKPOINTS}/([1-9][0-9]*)/{RECORD}")


class Mirror:
    """The bucket of a run, and the local folder that is copied to it.

    Every method waits for a bucket that stops answering, and says so.

    Args:
        bucket: the bucket.
        folder: the local folder.

    Raises:
        UserError: the bucket refuses access; so do the methods.
        Outage: it does not answer for ten minutes; so do the methods.
    """

    def __init__(self, bucket: Bucket, folder: Path):
        self.bucket, self.folder = bucket, folder
        self._copied: dict[str, tuple[int, int]] = {}
        self._patience = OUTAGE_SECONDS

    def pull(self) -> None:
        """Make the local folder what the bucket holds, without half-written checkpoints."""
        names = set(self.bucket.files()) - {FILE}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        complete = {found[1] for name in names if (found := _RECORD_NAME.fullmatch(name))}
        for name in sorted(names):
            parts = name.split("/")
            if parts[0] == CHECKPOINTS and len(parts) > 2 and parts[1] not in complete:
                self._remove(name)
            elif not _NOT_READ & {*parts[:2]} and ".." not in parts:
                self._download(name)
        self._copied = self._local()

    def push(self) -> None:
        """Copy to the bucket what changed since the last call, and delete there what is gone.

        What is new comes first: a checkpoint takes the place of an older one.
        """
        now = self._local()
        # What makes a folder complete comes last, and goes first.
        for name in sorted(now, key=lambda n: (_completes(n), n)):
            if self._copied.get(name) != now[name]:
                self._upload(name)
                self._copied[name] = now[name]
        gone = self._copied.keys() - now.keys()
        for name in sorted(gone, key=lambda n: (not _completes(n), n)):
            self._remove(name)
            del self._copied[name]
        steps = {found[0].removesuffix(RECORD) for n in gone if (found := _RECORD_NAME.match(n))}
        if steps and jax.process_count() > 1:  # the parts that other processes wrote
            for name in self._files():
                if name.startswith(tuple(steps)):
                    self._remove(name)

    def push_once(self) -> None:
        """`push`, without waiting for a bucket that does not answer."""
        self._patience = 0.0
        self.push()

    def _upload(self, name: str) -> None:
        if {CHECKPOINTS, "adapter"} & {*name.split("/")[:2]}:
            self._put(self.folder / name, name)
            return
        # The run may add to it meanwhile, and a put of a file that grows can fail.
        copy = self.folder / f".{Path(name).name}.part"
        shutil.copyfile(self.folder / name, copy)
        self._put(copy, name)
        copy.unlink()

    def send(self, folder: Path, name: str) -> None:
        """Copy a folder to the bucket under this name."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self._put(file, f"{name}/{file.relative_to(folder).as_posix()}")

    def get(self, name: str) -> None:
        """Copy the files of a folder of the bucket that the local folder lacks."""
        for file in self._files():
            if file.startswith(f"{name}/") and not (self.folder / file).exists():
                self._download(file)
        self._copied |= {n: seen for n, seen in self._local().items() if n.startswith(f"{name}/")}

    def _put(self, file: Path, name: str) -> None:
        self._answered(lambda: self.bucket.upload(file, name))

    def _download(self, name: str) -> None:
        self._answered(lambda: self.bucket.download(name, self.folder / name))

    def _remove(self, name: str) -> None:
        self._answered(lambda: self.bucket.remove(name))

    def _files(self) -> dict[str, list[Any]]:
        return self._answered(self.bucket.files)

    def _answered(self, request: Callable[[], T]) -> T:
        """The answer to a request, repeated for as long as there is patience."""
        began, pause, silent = time.monotonic(), 1.0, False
        while True:
            try:
                answer = request()
                break
            except Unanswered as error:
                waited = time.monotonic() - began
                if waited >= self._patience:
                    raise Outage(
                        f"{error}. Nothing was lost: {self.folder} has the files of this run, and "
                        "--resume=auto continues from the last checkpoint in the bucket"
                    ) from None
                if not silent:
                    minutes = self._patience / 60
                    report(f"warning: {error}; trying again for up to {minutes:.0f} minutes")
                silent = True
            time.sleep(min(pause, max(0.0, self._patience - waited)))
            pause = min(2 * pause, PAUSE_SECONDS)
        if silent:
            report(f"{self.bucket.url} answers again")
        return answer

    def _local(self) -> dict[str, tuple[int, int]]:
        found = {}
        for file in self.folder.rglob("*"):
            name = file.relative_to(self.folder).as_posix()
            if name == FILE or name.endswith((".tmp", ".part")) or not file.is_file():
                continue
            with contextlib.suppress(FileNotFoundError):  # the run removed it just now
                stat = file.stat()
                found[name] = (stat.st_size, stat.st_mtime_ns)
        return found


class BucketLease:
    """The lease of a bucket's folder, as `lock.lease` takes it."""

    def __init__(self, bucket: Bucket):
        self._bucket, self.name = bucket, bucket.url

    def read(self) -> bytes | None:
        """What the object says; None without one."""
        return self._bucket.read(FILE)

    def write(self, content: bytes) -> None:
        """Replace the object."""
        self._bucket.write(FILE, content)

    def remove(self) -> None:
        """Delete the object."""
        self._bucket.remove(FILE)


@contextlib.contextmanager
def open_mirror(url: str, folder: Path, wait: bool) -> Iterator[tuple[Mirror, Lock]]:
    """Hold the lease of a bucket's folder, with a local folder that was made from it.

    Args:
        url: `gs://BUCKET/FOLDER`.
        folder: the local folder; what it holds is replaced.
        wait: as in `lock_folder`.

    Raises:
        UserError: the bucket cannot be used, or another run holds the folder.
        Outage: the bucket of a run that this machine has begun does not answer, with `wait`, or
            while the run continues.
    """
    with contextlib.ExitStack() as stack:
        try:
            bucket = Bucket(url)
            lock = stack.enter_context(lease(BucketLease(bucket), wait))
            mirror = Mirror(bucket, folder)
            mirror.pull()
        except Unanswered as error:
            # The URL was right before.
            if wait and folder.is_dir():
                raise Outage(f"{error}. {folder} keeps what this machine had of the run") from None
            raise
        try:
            yield mirror, lock
        except BaseException as error:
            # The last metrics; the checkpoints have been copied already.
            if not isinstance(error, Outage):
                with contextlib.suppress(Exception):
                    lock.check()
                    mirror.push_once()
            raise
        lock.check()
        mirror.push()
        report(f"copied to {bucket.url}")


def _completes(name: str) -> bool:
    return name.endswith((f"/{RECORD}", "adapter_config.json"))
