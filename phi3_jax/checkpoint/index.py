"""The index of a model folder: which tensors its safetensors files hold, and where.

Each file's header is read once, when the index is built; the tensors themselves only on request.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

import numpy as np
from safetensors import SafetensorError, safe_open

from phi3_jax.errors import UserError, at_most_ten
from phi3_jax.model.config import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The fingerprint covers this many values at the start and at the end of a tensor's edge rows.
_EDGE = 1024


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, as the file's header describes it.

    Attributes:
        file: the file that holds it.
        name: its name there.
        dtype: safetensors' name of its dtype, such as `BF16`.
        shape: its shape in the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read the tensor, or the slice of it given by `index`, and nothing else from the file.

        The file is opened on each call: with a mapping left open, everything ever read through it
        would count as this process's memory.
        """
        with safe_open(self.file, "np") as reader:
            part = reader.get_slice(self.name)
            values: np.ndarray = part[index] if index else part[:]
        return values


Index = Mapping[str, StoredTensor]


def read_index(directory: Path) -> Index:
    """Every tensor of a model folder, by name.

    If there is a model.safetensors, an index beside it is stale and ignored, as in transformers.

    Raises:
        UserError: no safetensors, a missing shard, a damaged file, a shard outside the folder, or
            a tensor in two files; the message names each.
    """
    found: dict[str, StoredTensor] = {}
    for file in sorted(_shards(directory)):
        for tensor in _read_header(file):
            if (other := found.get(tensor.name)) is not None:
                raise UserError(
                    f"{directory}: {tensor.name} is in {other.file.name} and in {file.name}; "
                    "remove the file that does not belong to this checkpoint"
                )
            found[tensor.name] = tensor
    return found


def read_edges(index: Index) -> dict[str, bytes]:
    """The bytes of the first and last values of each tensor's first and last row, by name."""
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in index.values():
        by_file.setdefault(tensor.file, []).append(tensor)
    edges = {}
    for file, tensors in by_file.items():
        with safe_open(file, "np") as reader:
            for tensor in tensors:
                if not tensor.shape or not tensor.shape[0]:  # a scalar has no rows to choose from
                    edges[tensor.name] = reader.get_tensor(tensor.name).tobytes()
                    continue
                part = reader.get_slice(tensor.name)
                rows = (part[:1], part[tensor.shape[0] - 1 :])
                edges[tensor.name] = b"".join(_ends(row) for row in rows)
    return edges


def _ends(row: np.ndarray) -> bytes:
    flat = np.ascontiguousarray(row).reshape(-1)
    return flat[:_EDGE].tobytes() + flat[-_EDGE:].tobytes()


def _shards(directory: Path) -> Iterable[Path]:
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.exists() and single.is_file():
        return [single]
    if not index.exists():
        files = set(directory.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{directory}: no *.safetensors files; convert a checkpoint in another format "
                "to safetensors first (transformers: save_pretrained)"
            )
        return files
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: not a safetensors index (no weight_map)")
    for tensor, name in weight_map.items():
        path = PurePath(name) if isinstance(name, str) else None
        if path is None or path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise UserError(f"{index}: weight_map places {tensor} in {name!r}, not in this folder")
    files = {directory / name for name in weight_map.values()}
    # Unlike `Path.exists`, this raises nothing for a name that no file can have.
    if missing := sorted(file.name for file in files if not os.path.exists(file)):
        raise UserError(
            f"{directory}: {INDEX_FILE} lists missing shards: {', '.join(at_most_ten(missing))}"
        )
    return files


def _read_header(file: Path) -> list[StoredTensor]:
    found = []
    if not file.is_file():
        raise UserError(f"{file}: not a regular file")
    try:
        with safe_open(file, "np") as reader:
            for name in reader.keys():
                part = reader.get_slice(name)
                found.append(StoredTensor(file, name, part.get_dtype(), tuple(part.get_shape())))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or not a safetensors file ({error})") from None
    return found
