"""Hugging Face model folders: locating them, reading and writing safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

import lora_flax
from phi3_jax.errors import UserError
from phi3_jax.model.config import Phi3Config

INDEX_FILE = "model.safetensors.index.json"
_TYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def resolve(path_or_repo_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: the given folder, or a hub id's snapshot in the hub cache.

    From the hub, only safetensors, JSON, chat templates and tokenizer files are downloaded: no
    pickle, no code.

    Raises:
        UserError: neither a folder nor a model available on the hub.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        return path
    if not _is_repo_id(path_or_repo_id):
        raise UserError(f"{path_or_repo_id}: no such folder")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
    with _hub_errors(path_or_repo_id):
        return Path(
            snapshot_download(str(path_or_repo_id), revision=revision, allow_patterns=patterns)
        )


def resolve_file(path_or_repo_id: str | Path, name: str, revision: str | None = None) -> Path:
    """One file of a model folder or hub id; nothing else is downloaded.

    Raises:
        UserError: as in `resolve`.
    """
    if not _is_repo_id(path_or_repo_id):
        return resolve(path_or_repo_id) / name
    from huggingface_hub import hf_hub_download

    with _hub_errors(path_or_repo_id, f"{name} is "):
        return Path(hf_hub_download(str(path_or_repo_id), name, revision=revision))


def _is_repo_id(path_or_repo_id: str | Path) -> bool:
    """Whether this looks like a hub model id rather than a local file or folder."""
    name = str(path_or_repo_id)
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
            f"{repo_id}: no such folder, and {what}not to be had from the hub "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from None


def files_of_tensors(directory: Path) -> dict[str, Path]:
    """Map each tensor name to the file that holds it.

    Raises:
        UserError: no safetensors, a missing shard, or a damaged file; the message names each.
    """
    index = directory / INDEX_FILE
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{index}: not a safetensors index") from None
        files = {directory / name for name in weight_map.values()}
        if missing := sorted(file.name for file in files if not file.exists()):
            raise UserError(f"{directory}: {INDEX_FILE} names shards that are missing: {missing}")
    else:
        files = set(directory.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{directory}: no *.safetensors there; a checkpoint in another format must be "
                "saved as safetensors first (transformers: save_pretrained)"
            )
    found: dict[str, Path] = {}
    for file in sorted(files):
        try:
            with safe_open(file, "np") as reader:
                found |= dict.fromkeys(reader.keys(), file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or not a safetensors file ({error})") from None
    return found


def read_tensor(file: Path, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """Read one tensor, or the slice of it given by `index`, and nothing else from the file.

    The file is opened per call: a mapping left open would count everything ever read through it as
    this process's memory.
    """
    with safe_open(file, "np") as reader:
        part = reader.get_slice(name)
        return part[index] if index else part[:]


def write_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> None:
    """Write a safetensors file tensor by tensor, under a temporary name until complete.

    The library's `save_file` needs all tensors at once and copies each, so a 5 GB shard takes
    10 GB.

    Args:
        path: the file to write.
        shapes: shapes keyed by name, in the order of `tensors`.
        dtype: dtype of all tensors.
        tensors: the tensors, produced one at a time.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": _TYPE_NAMES[dtype.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    pieces = (np.ascontiguousarray(tensor).view(np.uint8).data for tensor in tensors)
    beginning = len(text).to_bytes(8, "little") + text
    lora_flax.write_atomically(path, itertools.chain((beginning,), pieces))


def write_json(value: dict, path: Path) -> None:
    """Indented, under a temporary name first."""
    lora_flax.write_atomically(path, json.dumps(value, indent=2) + "\n")


def fingerprint(directory: str | Path) -> str:
    """A digest that identifies a base model without reading all of it.

    It covers config.json and, for each tensor, its name, dtype, shape and the bytes of its first
    and last 1,024 values. The same weights sharded differently give the same digest.
    """
    directory = Path(directory)
    digest = hashlib.sha256(
        json.dumps(Phi3Config.from_file(directory / "config.json").to_hf(), sort_keys=True).encode()
    )
    for name, file in sorted(files_of_tensors(directory).items()):
        with safe_open(file, "np") as reader:
            part = reader.get_slice(name)
            digest.update(f"{name} {part.get_dtype()} {part.get_shape()}".encode())
            rows = part.get_shape()[0]
            for edge in (part[:1], part[rows - 1 :]):
                flat = np.ascontiguousarray(edge).reshape(-1)
                digest.update(flat[:1024].tobytes() + flat[-1024:].tobytes())
    return digest.hexdigest()
