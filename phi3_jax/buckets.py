"""Files in buckets: `gs://` for what a run reads and writes, `s3://` for what it reads.

fsspec does the work, through gcsfs and s3fs (`pip install 'phi3-jax[buckets]'`). A bucket has no
rename and no append: a put replaces an object as a whole.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

import lora_flax
from phi3_jax.errors import UserError

T = TypeVar("T")

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
ANSWER_SECONDS = 60.0
# What a transfer must at least reach, in bytes a second, beside the time for an answer.
SLOWEST = 1e5
_OF_THE_NETWORK = {
    "aiohttp.ClientError",
    "botocore.HTTPClientError",
    "google.TransportError",
    "requests.ConnectionError",  # also of proxies, which stands for status 502
    "requests.Timeout",
    "requests.ChunkedEncodingError",
    "socket.gaierror",
}
_SCHEME = re.compile("([A-Za-z][A-Za-z0-9+.-]+):/")
# The files of a model folder that are downloaded: no pickle, no code.
_MODEL_FILES = (".safetensors", ".json", ".jinja", "tokenizer.model", "merges.txt")


def scheme_of(path: str) -> str:
    """`gs` of `gs://bucket/run`; empty for a local path or a hub id."""
    found = _SCHEME.match(path)
    return found[1] if found else ""


class Unanswered(UserError):
    """A network or server failed; the same request may succeed later."""


class Outage(Unanswered):
    """A bucket did not answer for so long that the run ended; it can be started again."""


class Bucket:
    """The objects under a URL, by their names relative to it.

    Args:
        url: `gs://BUCKET/FOLDER` or `s3://BUCKET/FOLDER`.

    Raises:
        UserError: another scheme, or a missing package. Every method raises it for a bucket that
            does not exist or refuses access.
        Unanswered: the bucket does not answer within a minute, or cannot be reached; so do the
            methods, which allow more time for large files.
    """

    def __init__(self, url: str):
        scheme = scheme_of(url)
        if scheme not in PACKAGES or not url.startswith(f"{scheme}://"):
            raise UserError(f"{url}: only gs:// and s3:// are supported, not {scheme}:/")
        self.url = url.rstrip("/")
        self._root = self.url.removeprefix(f"{scheme}://")
        if not all(self._root.partition("/")):
            raise UserError(f"{url}: name a folder in the bucket, such as {self.url}/run")
        self._system = self._answered(lambda: _file_system(scheme))

    def files(self) -> dict[str, list[Any]]:
        """Size and tag of every object; the tag changes with its content."""

        def find() -> dict[str, dict[str, Any]]:
            self._system.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._system.find(self._root, detail=True)
            return found

        prefix = f"{self._root}/"
        found = {name.lstrip("/"): info for name, info in self._answered(find).items()}
        return {
            name.removeprefix(prefix): [int(info["size"]), _tag(info)]
            for name, info in found.items()
            if name.startswith(prefix) and not name.endswith("/")
        }

    def tag_of_file(self) -> list[Any] | None:
        """Size and tag, if the URL itself is an object; otherwise None."""

        def info() -> list[Any] | None:
            self._system.invalidate_cache()
            if not self._system.isfile(self._root):
                return None
            found = self._system.info(self._root)
            return [int(found["size"]), _tag(found)]

        return self._answered(info)

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if it does not exist."""

        def cat() -> bytes | None:
            self._system.invalidate_cache()
            try:
                content: bytes = self._system.cat_file(self._key(name))
            except FileNotFoundError:
                return None
            return content

        return self._answered(cat)

    def write(self, name: str, content: bytes) -> None:
        """Put an object with this content."""
        self._answered(lambda: self._system.pipe_file(self._key(name), content))

    def remove(self, name: str) -> None:
        """Delete an object, if it exists."""

        def delete() -> None:
            try:
                self._system.rm_file(self._key(name))
            except FileNotFoundError:
                pass

        self._answered(delete)

    def upload(self, file: Path, name: str) -> None:
        """Put an object with the content of a file."""
        seconds = ANSWER_SECONDS + file.stat().st_size / SLOWEST
        self._answered(lambda: self._system.put_file(str(file), self._key(name)), seconds)

    def download(self, name: str, file: Path) -> None:
        """Write an object to a file, as a whole or not at all; the name "" is the URL itself."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.part")
        self._tried(lambda: self._system.get_file(self._key(name), str(part)))
        part.replace(file)

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _answered(self, function: Callable[[], T], seconds: float | None = None) -> T:
        """Call the function in a thread: the clients retry for long without a word."""
        seconds = ANSWER_SECONDS if seconds is None else seconds
        done: list[T] = []
        failed: list[BaseException] = []

        def call() -> None:
            try:
                done.append(function())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise Unanswered(f"{self.url}: no answer within {seconds:.0f} s; check the network")
        if failed:
            raise self._problem(failed[0]) from None
        return done[0]

    def _tried(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:
            raise self._problem(error) from None

    def _problem(self, error: BaseException) -> BaseException:
        if isinstance(error, UserError) or not isinstance(error, Exception):
            return error
        lines = str(error).strip().splitlines() or [""]
        kind = Unanswered if may_pass(error) else UserError
        return kind(
            f"{self.url}: {type(error).__name__}: {lines[0]}; check its name and that this "
            "machine may use it (for gs://: gcloud auth application-default login)"
        )


def may_pass(error: BaseException) -> bool:
    """Whether an error of a client is one of the network or the server, which may pass."""
    code = str(getattr(error, "code", None) or getattr(error, "status", None) or "")
    if code.isdecimal():
        return code in ("408", "429") or int(code) >= 500
    # Without importing clients that may not be installed.
    known = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if known & _OF_THE_NETWORK or isinstance(error, TimeoutError | ConnectionError):
        return True
    network = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
    return isinstance(error, OSError) and error.errno in network


def fetch(url: str, cache: Path) -> Path:
    """A local copy of a file or folder in a bucket; only what changed is downloaded again.

    Args:
        url: `gs://...` or `s3://...`.
        cache: folder for such copies.

    Raises:
        UserError: there is nothing at that URL, or it cannot be read.
    """
    bucket = Bucket(url)
    target = cache / hashlib.sha256(bucket.url.encode()).hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        name = bucket.url.rpartition("/")[2]
        tag = bucket.tag_of_file()
        found = bucket.files() if tag is None else {name: tag}
        if any(file.endswith(".safetensors") for file in found) and tag is None:
            found = {file: tag for file, tag in found.items() if file.endswith(_MODEL_FILES)}
        if not found:
            raise UserError(f"{url}: there is no such file or folder")
        index = target.with_name(f"{target.name}.json")
        known = _read_index(index)
        for file, current in found.items():
            if known.get(file) != current or not (target / file).exists():
                bucket.download("" if tag is not None else file, target / file)
        for path in [path for path in target.rglob("*") if path.is_file()]:
            if path.relative_to(target).as_posix() not in found:
                path.unlink()
        lora_flax.write_atomically(index, json.dumps(found))
    return target if tag is None else target / name


def _read_index(file: Path) -> dict[str, Any]:
    """Which objects have a copy; none where the file is missing or damaged."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _tag(info: dict[str, Any]) -> str:
    return str(
        next((info[key] for key in ("etag", "ETag", "md5Hash", "created") if key in info), "")
    )


def _file_system(scheme: str) -> Any:
    import fsspec

    package = PACKAGES[scheme]
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{scheme}:// needs the package {package}: pip install 'phi3-jax[buckets]'"
        ) from None
    # gcsfs warns about a missing login at every call, and prints a traceback of every request that
    # failed for good; the error that follows says it in a line.
    logging.getLogger(package).setLevel(logging.CRITICAL)
    return fsspec.filesystem(scheme)
