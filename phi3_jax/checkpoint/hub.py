"""Locate a model: a local folder, or a hub id whose files are downloaded into the hub cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from phi3_jax.buckets import fetch, scheme_of
from phi3_jax.errors import UserError
from phi3_jax.platform import user_cache


def resolve(path_or_repo_id: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a model: the given one, or a copy of a hub id or bucket in a cache.

    Only safetensors, JSON, chat templates and tokenizer files are downloaded: no pickle, no code.
    From the hub, without `weights`, no safetensors either.

    Raises:
        UserError: neither a folder nor a model available on the hub.
    """
    if scheme_of(str(path_or_repo_id)):
        return fetch(str(path_or_repo_id), user_cache() / "buckets")
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{path} is a file; give its folder, {path.parent}")
    if not is_repo_id(path_or_repo_id):
        raise UserError(f"{path_or_repo_id}: no such folder")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "tokenizer.model", "merges.txt"]
    if weights:
        patterns.append("*.safetensors")
    with _hub_errors(path_or_repo_id):
        return Path(
            snapshot_download(str(path_or_repo_id), revision=revision, allow_patterns=patterns)
        )


def resolve_file(path_or_repo_id: str | Path, name: str, revision: str | None = None) -> Path:
    """One file of a model folder or hub id; nothing else is downloaded.

    Raises:
        UserError: as in `resolve`.
    """
    if not is_repo_id(path_or_repo_id):
        return resolve(path_or_repo_id) / name
    from huggingface_hub import hf_hub_download

    with _hub_errors(path_or_repo_id, f"{name} is "):
        return Path(hf_hub_download(str(path_or_repo_id), name, revision=revision))


def find_file(path_or_repo_id: str | Path, name: str, revision: str | None = None) -> Path | None:
    """One file of a folder or hub id as in `resolve_file`, or None if it is not there."""
    if not is_repo_id(path_or_repo_id):
        in_bucket = scheme_of(str(path_or_repo_id))
        folder = resolve(path_or_repo_id) if in_bucket else Path(path_or_repo_id).expanduser()
        file = folder / name
        return file if file.is_file() else None
    try:
        return resolve_file(path_or_repo_id, name, revision)
    except UserError:
        return None


def is_repo_id(path_or_repo_id: str | Path) -> bool:
    """Whether this looks like a hub model id rather than a local file or folder."""
    name = str(path_or_repo_id)
    if scheme_of(name):
        return False
    here = Path(path_or_repo_id).expanduser().exists()
    return not here and name.count("/") == 1 and not name.startswith((".", "/", "~"))


@contextlib.contextmanager
def _hub_errors(repo_id: str | Path, what: str = "") -> Iterator[None]:
    """Turn the hub client's exceptions into one error that names the model."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{repo_id}: no such folder, and {what}not available from the hub "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from None
