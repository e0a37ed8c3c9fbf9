"""Checkpoints that are quantized already: bitsandbytes' 4 bits, as transformers saves them.

Beside `NAME.weight`, the codes, such a file has `NAME.weight.absmax`, with double quantization
`NAME.weight.nested_absmax`, the tables `quant_map` and `nested_quant_map`, which are always the
same and not read, and what is no tensor as bytes of JSON:
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
    """Whether the tensor `NAME.weight` is there as 4-bit codes."""
    return any(f"{name}.{state}" in files for state in _STATES)


def is_part(files: dict[str, Path], name: str) -> bool:
    """Whether a tensor belongs to another one that is there as 4-bit codes."""
    return any(name.endswith(f".{part}") for part in _PARTS) and is_quantized(
        files, name.partition(".weight.")[0] + ".weight"
    )


def read_quantized(
    files: dict[str, Path], name: str, shape: tuple[int, ...], layer: Any
) -> dict[str, np.ndarray]:
    """The arrays of a quantized layer, from the file.

    Args:
        files: which file holds each tensor.
        name: of the weight.
        shape: that it has when it is not quantized, `[out, in]`.
        layer: quantized layer of the network that takes it.

    Raises:
        UserError: block sizes, a shape or a kind that the layer has not.
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
