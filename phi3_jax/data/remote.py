"""Files behind a URL (`gs://`, `s3://`, `hf://`, `https://`), through fsspec."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlparse

import fsspec

from phi3_jax.buckets import Unanswered, may_pass
from phi3_jax.errors import UserError


def is_url(path: str) -> bool:
    """Whether a path is a URL rather than a local file or a hub id."""
    return "://" in path


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file or folder behind a URL.

    Attributes:
        url: as the user gave it.
        files: the file system.
        root: its path there.
    """

    url: str
    files: Any
    root: str

    @classmethod
    def open(cls, url: str) -> Remote:
        """Find the file system.

        Raises:
            UserError: unknown, its package is missing, or it cannot be reached.
        """
        with remote_errors(url):
            files, root = fsspec.core.url_to_fs(url)
        return cls(url, files, root)

    def is_file(self) -> bool:
        """Whether this is a file; over HTTP a folder ends with a slash.

        Raises:
            UserError: it cannot be reached, or does not exist.
        """
        with remote_errors(self.url):
            if urlparse(self.url).scheme in ("http", "https"):
                return not self.url.endswith("/")
            if not self.files.exists(self.root):
                raise FileNotFoundError("no such file or folder")
            return bool(self.files.isfile(self.root))

    def list(self, folder: PurePosixPath) -> list[PurePosixPath]:
        """The files in a folder under this one, relative to it; none if there is no such folder."""
        place = posixpath.join(self.root, str(folder)) if folder.parts else self.root
        with remote_errors(self.url):
            try:
                found = self.files.ls(place, detail=True)
            except FileNotFoundError:
                return []
        names = [item["name"].rstrip("/") for item in found if item["type"] == "file"]
        return sorted(folder / PurePosixPath(urlparse(name).path).name for name in names)

    def read_text(self, name: str) -> str | None:
        """A text file of this folder; None if there is none, or it cannot be read."""
        content = self._content(PurePosixPath(name))
        return None if content is None else content.decode("utf-8-sig", errors="replace")

    def read_json(self, file: PurePosixPath) -> Any:
        """A JSON file of this folder; None if there is none, or it cannot be read."""
        try:
            return json.loads(self._content(file) or b"")
        except (ValueError, RecursionError):
            return None

    def saved_splits(self) -> Sequence[str]:
        """The splits of a `DatasetDict` that `save_to_disk` wrote here; none if there is none."""
        found = self.read_json(PurePosixPath("dataset_dict.json"))
        splits = found.get("splits") if isinstance(found, dict) else None
        return splits if isinstance(splits, list) else []

    def fetch(self, file: PurePosixPath | None, target: Path) -> None:
        """Download a file of this folder, or this file.

        Raises:
            UserError: it cannot be read.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with remote_errors(self.url):
            self.files.get_file(self._place(file), str(target))

    def size(self, file: PurePosixPath | None) -> int | None:
        """Bytes of a file of this folder, or of this file, if the file system says so."""
        with remote_errors(self.url):
            found: int | None = self.files.info(self._place(file)).get("size")
        return found

    def open_file(self, file: PurePosixPath | None) -> BinaryIO:
        """Open a file of this folder, or this file, for reading.

        Raises:
            UserError: it cannot be read.
        """
        with remote_errors(self.url):
            opened: BinaryIO = self.files.open(self._place(file), "rb")
        return opened

    def _content(self, file: PurePosixPath) -> bytes | None:
        """A file that says more about this folder, if there is one that can be read.

        Some servers refuse files that they lack, or whose names start with a dot.
        """
        try:
            found: bytes = self.files.cat_file(self._place(file))
        except Exception:  # every file system raises errors of its own
            return None
        return found

    def _place(self, file: PurePosixPath | None) -> str:
        return posixpath.join(self.root, str(file)) if file else self.root

    def name(self) -> str:
        """The file's name, without a query."""
        return PurePosixPath(urlparse(self.url).path or self.root).name


@contextlib.contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn what a file system raises into one error that names the URL."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{url}: {error} (pip install 'phi3-jax[buckets]' has what gs:// and s3:// need)"
        ) from None
    except UserError:
        raise
    except Exception as error:  # every file system raises errors of its own
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        if isinstance(error, FileNotFoundError) and first_line == url:
            first_line = "no such file"
        kind = Unanswered if may_pass(error) else UserError
        raise kind(f"{url}: cannot be read ({first_line})") from None
