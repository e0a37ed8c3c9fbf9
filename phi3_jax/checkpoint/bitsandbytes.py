"""Pre-quantized checkpoints: bitsandbytes' 4-bit format, as transformers saves it.

Besides the codes in `NAME.weight`, such a file has `NAME.weight.absmax` and, with double
quantization, `NAME.weight.nested_absmax`. The tables `quant_map` and `nested_quant_map` never vary
and are not read. Non-tensor settings are stored as JSON bytes in
`NAME.weight.quant_state.bitsandbytes__nf4`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from phi3_jax.checkpoint.folder import read_tensor
from phi3_jax.errors import UserError

BLOCK, NESTED_BLOCK = 64, 256
_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *_STATES)


def is_quantized(files: dict[str, Path], name: str) -> bool:
    """Whether the tensor `NAME.weight` is stored as 4-bit codes."""
    return any(f"{name}.{state}" in files for state in _STATES)


def is_part(files: dict[str, Path], name: str) -> bool:
    """Whether a tensor is auxiliary data of another tensor stored as 4-bit codes."""
    return any(name.endswith(f".{part}") for part in _PARTS) and is_quantized(
        files, name.partition(".weight.")[0] + ".weight"
    )


def read_quantized(
    files: dict[str, Path], name: str, shape: tuple[int, ...], layer: Any
) -> dict[str, np.ndarray]:
    """Read the arrays of a quantized layer from the file.

    Args:
        files: maps each tensor name to its file.
        name: name of the weight.
        shape: the weight's unquantized shape, `[out, in]`.
        layer: the network's quantized layer that receives the arrays.

    Raises:
        UserError: block sizes, a shape or a quantization type that do not match the layer.
    """
    state_name = next(f"{name}.{state}" for state in _STATES if f"{name}.{state}" in files)
    where = files[state_name]
    try:
        state = json.loads(read_tensor(where, state_name).tobytes())
        found = (state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK), state["shape"])
    except (ValueError, KeyError):
        raise UserError(f"{where}: {state_name} is damaged") from None
    if found != (BLOCK, NESTED_BLOCK, list(shape)):
        raise UserError(
            f"{where}: {name} has block sizes and a shape {found}; "
            f"{(BLOCK, NESTED_BLOCK, list(shape))} are needed"
        )
    nested = f"{name}.nested_absmax"
    parts = {
        part: read_tensor(files[part], part)
        for part in (name, f"{name}.absmax", nested)
        if part in files
    }
    if not hasattr(layer, "from_bitsandbytes"):
        raise UserError(f"{where}: {name} is quantized; load it with a quantization of its kind")
    try:
        return layer.from_bitsandbytes(
            state["quant_type"],
            parts[name],
            parts[f"{name}.absmax"],
            parts.get(nested),
            state.get("nested_offset", 0.0),
        )
    except (ValueError, KeyError) as error:
        raise UserError(f"{where}: {name}: {error}") from None


def layer_at(model: nnx.Module, path: tuple[str, ...]) -> Any:
    """The module at a path."""
    node: Any = model
    for part in path:
        node = getattr(node, part)
    return node
