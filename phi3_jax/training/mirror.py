"""A run whose output folder is a bucket: it works in a local folder, and copies that at every save.

An object is written by one put, so nothing in the bucket is ever half a file. The record of a
checkpoint is put last: until then the checkpoint does not exist.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax

from phi3_jax.buckets import Bucket
from phi3_jax.training.interrupt import report
from phi3_jax.training.lock import FILE, Lock, lease
from phi3_jax.training.state_files import CHECKPOINTS, RECORD

# Written anew by a resumed run, or only added to.
_NOT_READ = ("adapter/", "tensorboard/", "profile/")
_RECORD_NAME = re.compile(rf"{CHECKPOINTS}/([1-9][0-9]*)/{RECORD}")


class Mirror:
    """The bucket of a run, and the local folder that is copied to it.

    Args:
        bucket: the bucket.
        folder: the local folder.
    """

    def __init__(self, bucket: Bucket, folder: Path):
        self.bucket, self.folder = bucket, folder
        self._copied: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Make the local folder what the bucket holds, without half-written checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        names = set(self.bucket.files()) - {FILE}
        complete = {found[1] for name in names if (found := _RECORD_NAME.fullmatch(name))}
        for name in sorted(names):
            parts = name.split("/")
            if parts[0] == CHECKPOINTS and len(parts) > 2 and parts[1] not in complete:
                self.bucket.remove(name)
            elif not name.startswith(_NOT_READ) and ".." not in parts:
                self.bucket.download(name, self.folder / name)
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
            self.bucket.remove(name)
            del self._copied[name]
        steps = {found[0].removesuffix(RECORD) for n in gone if (found := _RECORD_NAME.match(n))}
        if steps and jax.process_count() > 1:  # the parts that other processes wrote
            for name in self.bucket.files():
                if name.startswith(tuple(steps)):
                    self.bucket.remove(name)

    def _upload(self, name: str) -> None:
        if name.startswith((f"{CHECKPOINTS}/", "adapter/")):
            self.bucket.upload(self.folder / name, name)
            return
        # The run may add to it meanwhile, and a put of a file that grows can fail.
        copy = self.folder / f".{Path(name).name}.part"
        shutil.copyfile(self.folder / name, copy)
        self.bucket.upload(copy, name)
        copy.unlink()

    def send(self, folder: Path, name: str) -> None:
        """Copy a folder to the bucket under this name."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.bucket.upload(file, f"{name}/{file.relative_to(folder).as_posix()}")

    def get(self, name: str) -> None:
        """Copy the files of a folder of the bucket that the local folder lacks."""
        for file in self.bucket.files():
            if file.startswith(f"{name}/") and not (self.folder / file).exists():
                self.bucket.download(file, self.folder / file)
        self._copied |= {n: seen for n, seen in self._local().items() if n.startswith(f"{name}/")}

    def _local(self) -> dict[str, tuple[int, int]]:
        files = (file for file in self.folder.rglob("*") if file.is_file())
        named = {file.relative_to(self.folder).as_posix(): file.stat() for file in files}
        return {
            name: (stat.st_size, stat.st_mtime_ns)
            for name, stat in named.items()
            if name != FILE and not name.endswith((".tmp", ".part"))
        }


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
    """
    bucket = Bucket(url)
    with lease(BucketLease(bucket), wait) as lock:
        mirror = Mirror(bucket, folder)
        mirror.pull()
        try:
            yield mirror, lock
        except BaseException:
            # The last metrics; the checkpoints have been copied already.
            with contextlib.suppress(Exception):
                lock.check()
                mirror.push()
            raise
        lock.check()
        mirror.push()
        report(f"copied to {bucket.url}")


def _completes(name: str) -> bool:
    return name.endswith((f"/{RECORD}", "adapter_config.json"))
