"""Files behind a URL (`gs://`, `s3://`, `hf://`, `https://`), through fsspec."""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import fsspec

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
        with _errors(url):
            files, root = fsspec.core.url_to_fs(url)
        return cls(url, files, root)

    def is_file(self) -> bool:
        """Whether this is a file; over HTTP a folder ends with a slash.

        Raises:
            UserError: it cannot be reached, or does not exist.
        """
        with _errors(self.url):
            if urlparse(self.url).scheme in ("http", "https"):
                return not self.url.endswith("/")
            if not self.files.exists(self.root):
                raise FileNotFoundError("no such file or folder")
            return bool(self.files.isfile(self.root))

    def list(self, folder: PurePosixPath) -> list[PurePosixPath]:
        """The files in a folder under this one, relative to it; none if there is no such folder."""
        place = posixpath.join(self.root, str(folder)) if folder.parts else self.root
        with _errors(self.url):
            try:
                found = self.files.ls(place, detail=True)
            except FileNotFoundError:
                return []
        names = [item["name"].rstrip("/") for item in found if item["type"] == "file"]
        return sorted(folder / PurePosixPath(urlparse(name).path).name for name in names)

    def fetch(self, file: PurePosixPath | None, target: Path) -> None:
        """Download a file of this folder, or this file.

        Raises:
            UserError: it cannot be read.
        """
        place = posixpath.join(self.root, str(file)) if file else self.root
        target.parent.mkdir(parents=True, exist_ok=True)
        with _errors(self.url):
            self.files.get_file(place, str(target))

    def name(self) -> str:
        """The file's name, without a query."""
        return PurePosixPath(urlparse(self.url).path or self.root).name


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
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
        raise UserError(f"{url}: cannot be read ({first_line})") from None
