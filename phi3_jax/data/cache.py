"""Tokenized files on disk, in Arrow: made once, then mapped into memory at every start.

An entry is named after all that decides its bytes: the file's contents, which of its rows are
wanted, the tokenizer with its chat template, the settings, and this program's own code. It is
written under another name and renamed when it is complete, so that a crash leaves nothing that a
later run would read. Processes that need the same files at the same time, on one host or on
several with a shared folder, wait for the one that came first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from phi3_jax.data.chunks import Chunk, select_rows, split_into_chunks
from phi3_jax.data.encoder import SCHEMA, EncoderSettings
from phi3_jax.data.files import DataFile
from phi3_jax.data.tokenizer import digest_tokenizer
from phi3_jax.data.workers import encode_chunks
from phi3_jax.errors import UserError

KEEP_DAYS = 30


@dataclasses.dataclass
class CountedFile:
    """A file with the number of its rows.

    Attributes:
        file: the file.
        digest: of its contents.
        rows: how many it has.
        chunks: the same in chunks, if it has been split already.
    """

    file: DataFile
    digest: str
    rows: int
    chunks: list[Chunk] | None = None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Rows of a file, by their numbers: ascending, each once."""

    counted: CountedFile
    numbers: np.ndarray


class TokenCache:
    """The cache in one folder.

    Args:
        root: the folder; created if missing.
        scratch: a folder for temporary files, which the caller removes.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch = root, scratch

    def count(self, file: DataFile) -> CountedFile:
        """Hash a file and count its rows; the count of a known file is remembered.

        Raises:
            UserError: the file cannot be read.
        """
        digest = file.digest()
        kind = file.kind.replace(".", "-")
        known = self.root / "rows" / f"{digest}{kind}-{_code()[:8]}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return CountedFile(file, digest, int(json.loads(known.read_text())["rows"]))
        chunks = self._split(file)
        rows = sum(chunk.rows for chunk in chunks)
        with _written(known) as name:
            Path(name).write_text(json.dumps({"rows": rows}))
        return CountedFile(file, digest, rows, chunks)

    def entries(
        self,
        wanted: Sequence[Wanted],
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings,
        workers: Callable[[int, int], int],
        watch: Callable[[int, int, pa.RecordBatch, DataFile], None],
    ) -> list[Path]:
        """The Arrow file of each file's wanted rows, made if it is missing.

        Args:
            wanted: the rows.
            tokenizer: the checkpoint's tokenizer.
            settings: what decides a row's tokens.
            workers: the number of processes for a number of chunks and their bytes.
            watch: called with rows done, rows in all, what was just made, and of which file;
                raises to stop.

        Raises:
            UserError: a file cannot be read, or a row needs what the tokenizer lacks.
        """
        digest = digest_tokenizer(tokenizer)
        keys = [_key(one, digest, settings) for one in wanted]
        paths = [self.root / key[:2] / f"{key}.arrow" for key in keys]
        for path in paths:
            with contextlib.suppress(OSError):  # missing, or another user's
                os.utime(path)
        if all(path.exists() for path in paths):
            return paths
        everything = hashlib.sha256("".join(keys).encode()).hexdigest()
        with _locked(self.root / f"{everything}.lock"):
            missing = {
                path: one
                for path, one in zip(paths, wanted, strict=True)
                if not path.exists()  # another process may have made it meanwhile
            }
            self._make(missing, tokenizer, settings, workers, watch)
        return paths

    def _split(self, file: DataFile) -> list[Chunk]:
        return split_into_chunks(file, Path(tempfile.mkdtemp(dir=self.scratch)))

    def _make(
        self,
        missing: dict[Path, Wanted],
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings,
        workers: Callable[[int, int], int],
        watch: Callable[[int, int, pa.RecordBatch, DataFile], None],
    ) -> None:
        work = {}
        for path, one in missing.items():
            chunks = one.counted.chunks or self._split(one.counted.file)
            work[path] = select_rows(chunks, one.numbers.tolist())
        chunks = [chunk for own in work.values() for chunk in own]
        size = sum(chunk.end - chunk.begin for chunk in chunks if chunk.kind != "table")
        total, done = sum(len(one.numbers) for one in missing.values()), 0
        exchange = Path(tempfile.mkdtemp(dir=self.scratch))
        made = encode_chunks(chunks, tokenizer, settings, workers(len(chunks), size), exchange)
        with contextlib.closing(made):
            for path, own in work.items():
                with _written(path) as name, pa.OSFile(name, "wb") as sink:
                    with pa.ipc.new_file(sink, SCHEMA) as writer:
                        for _ in own:
                            batch = next(made)
                            done += batch.num_rows
                            watch(done, total, batch, missing[path].counted.file)
                            writer.write_batch(batch)


@contextlib.contextmanager
def open_cache(root: Path) -> Iterator[TokenCache]:
    """The cache in a folder; in a temporary one if that folder cannot be written.

    Memory-mapped entries stay readable after the temporary folder is gone.
    """
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            _remove_unused(root)
            scratch = stack.enter_context(
                tempfile.TemporaryDirectory(dir=root, prefix="tmp-", ignore_cleanup_errors=True)
            )
        except OSError:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            root = Path(scratch)
        yield TokenCache(root, Path(scratch))


def _remove_unused(root: Path) -> None:
    """Remove what no run has used for `KEEP_DAYS`, and what a killed one left behind."""
    oldest = time.time() - KEEP_DAYS * 24 * 3600
    for path in [*root.glob("??/*.arrow"), *root.glob("*.lock"), *root.glob("rows/*.json")]:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()
    for path in [*root.glob("tmp-*"), *root.glob("??/.*")]:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _key(wanted: Wanted, tokenizer: str, settings: EncoderSettings) -> str:
    counted = wanted.counted
    whole = len(wanted.numbers) == counted.rows
    rows = "all" if whole else hashlib.sha256(wanted.numbers.astype("<i8").tobytes()).hexdigest()
    parts = {
        "code": _code(),
        "tokenizer": tokenizer,
        "settings": dataclasses.asdict(settings),
        "file": counted.digest,
        "kind": counted.file.kind,
        "rows": rows,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """A digest of the code that makes entries: all of this package's."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; without one on a file system that has none."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _written(path: Path) -> Iterator[str]:
    """The name of a file that gets its own when it is complete.

    The name is not made of the process id, which processes on several hosts may share.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:16]}-")
    os.close(handle)
    try:
        yield name
        handle = os.open(name, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: the tokenized data cannot be written ({error}); set data.cache_dir to "
            "a folder with more space"
        ) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def chosen(files: Iterable[CountedFile], numbers: np.ndarray) -> list[Wanted]:
    """Rows by their ascending numbers over all files, as rows of each file; files without any, too.

    Args:
        files: the files, whose rows are numbered one after the other.
        numbers: int64, ascending, each once.
    """
    found, first = [], 0
    for counted in files:
        begin, end = np.searchsorted(numbers, [first, first + counted.rows])
        found.append(Wanted(counted, numbers[begin:end] - first))
        first += counted.rows
    return found
