"""Write a GGUF file tensor by tensor, and read it back."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from phi3_jax.errors import UserError

try:
    import gguf
except ImportError as error:
    raise UserError("GGUF files need the gguf package: pip install 'phi3-jax[gguf]'") from error

# The types that the gguf package can write, by the names of `--dtype`.
TYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "q8_0": "Q8_0",
    "q5_1": "Q5_1",
    "q5_0": "Q5_0",
    "q4_1": "Q4_1",
    "q4_0": "Q4_0",
}
PLAIN = ("float32", "float16", "bfloat16")
# Values converted at a time: quantizing in numpy takes several times the memory of its input.
_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
        name: llama.cpp's name.
        shape: its shape in numpy's order.
        kind: a key of `TYPES`.
    """

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def type(self) -> Any:
        """The `gguf.GGMLQuantizationType`."""
        return gguf.GGMLQuantizationType[TYPES[self.kind]]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(self.shape[-1] // block * size)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclasses.dataclass(frozen=True)
class Check:
    """What was compared after writing.

    Attributes:
        tensors: number of tensors, read back and equal to what was written.
        worst: name of the tensor with the largest rounding error.
        error: that error: the root mean square of what the type changed, relative to the values.
    """

    tensors: int
    worst: str
    error: float

    def __str__(self) -> str:
        return (
            f"{self.tensors} tensors read back and equal; rounding changed {self.worst} the most, "
            f"by {self.error:.1e} (root mean square, relative)"
        )


def fitting_kind(shape: tuple[int, ...], kind: str) -> str:
    """The type for a tensor: float32 for vectors; float16 where rows do not divide into blocks."""
    if len(shape) < 2:
        return "float32"
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[TYPES[kind]]]
    return "float16" if shape[-1] % block else kind


def write_gguf(
    path: Path, writer: Any, tensors: list[GGUFTensor], arrays: Iterable[np.ndarray]
) -> Check:
    """Write a file, under a temporary name until complete, and read it back.

    Args:
        path: the file to write.
        writer: a `gguf.GGUFWriter` without a path, which has the metadata.
        tensors: the tensors, in the order of `arrays`.
        arrays: any float dtype, produced one at a time.

    Raises:
        UserError: the file cannot be written or differs when read back, or a value is not finite
            or too large for its type.
    """
    for tensor in tensors:
        raw = tensor.kind not in ("float32", "float16")
        shape = (*tensor.shape[:-1], tensor.row_bytes) if raw else tensor.shape
        dtype = np.dtype(np.uint8 if raw else tensor.kind)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.bytes, tensor.type)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (out,) = writer.fout
        writer.write_padding(out, out.tell())
        digests, errors = {}, {}
        for tensor, array in zip(tensors, arrays, strict=True):
            digests[tensor.name], errors[tensor.name] = _write(out, tensor, array)
            writer.write_padding(out, tensor.bytes)
        out.flush()
        os.fsync(out.fileno())
        writer.close()
        _read_back(temporary, digests)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    worst = max(errors, key=errors.__getitem__)
    return Check(len(tensors), worst, errors[worst])


def _write(out: Any, tensor: GGUFTensor, array: np.ndarray) -> tuple[bytes, float]:
    """Write one tensor; returns the digest of its bytes and its rounding error."""
    assert array.shape == tensor.shape, tensor.name
    digest, changed, size = hashlib.blake2b(), 0.0, 0.0
    for rows in _chunks(array):
        wide = np.asarray(rows, np.float32)
        packed = _pack(wide, tensor)
        if not np.isfinite(wide).all():
            raise UserError(f"{tensor.name} has values that are not finite")
        read = np.asarray(gguf.dequantize(packed, tensor.type), np.float32)
        if not np.isfinite(read).all():
            raise UserError(f"{tensor.name} has values that are too large for {tensor.kind}")
        changed += float(np.sum(np.square(read - wide, dtype=np.float64)))
        size += float(np.sum(np.square(wide, dtype=np.float64)))
        data = np.ascontiguousarray(packed).tobytes()
        digest.update(data)
        out.write(data)
    return digest.digest(), math.sqrt(changed / size) if size else 0.0


def _pack(wide: np.ndarray, tensor: GGUFTensor) -> np.ndarray:
    """Float32 rows as the bytes of the tensor's type."""
    if tensor.kind == "bfloat16":  # the package's own rounding is slower
        return wide.astype(ml_dtypes.bfloat16).view(np.uint8)
    with np.errstate(over="ignore"):
        packed: np.ndarray = gguf.quantize(wide, tensor.type)
    return packed


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = array.reshape(-1, array.shape[-1])
    step = max(_CHUNK // rows.shape[1], 1)
    for first in range(0, len(rows), step):
        yield rows[first : first + step]


def _read_back(path: Path, digests: dict[str, bytes]) -> None:
    found = {
        tensor.name: hashlib.blake2b(np.ascontiguousarray(tensor.data).tobytes()).digest()
        for tensor in gguf.GGUFReader(path).tensors
    }
    wrong = sorted(name for name in {*found, *digests} if found.get(name) != digests.get(name))
    if wrong:
        raise UserError(f"{path}: read back otherwise than it was written: {', '.join(wrong)}")
