"""Pre-quantized checkpoints: bitsandbytes' 4-bit format, as transformers saves it.

Next to its codes, `NAME.weight`, each quantized weight of such a file has the arrays and settings
that `lora_flax.QuantizedArray.from_bitsandbytes` reads, as `NAME.weight.*`.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from lora_flax import LoraError, QuantizedArray
from phi3_jax.checkpoint.folder import read_tensor
from phi3_jax.errors import UserError

# Ends in the kind.
_STATE = ".quant_state.bitsandbytes__"


def quantized_tensors(files: dict[str, Path]) -> set[str]:
    """Names of the weights that are stored in 4 bits."""
    return {name.partition(_STATE)[0] for name in files if _STATE in name}


def is_part(name: str, quantized: set[str]) -> bool:
    """Whether a tensor belongs to one of those weights, besides its codes."""
    weight, dot, _ = name.partition(".weight.")
    return bool(dot) and f"{weight}.weight" in quantized


def read_quantized(
    files: dict[str, Path], name: str, shape: tuple[int, ...], dtype: jnp.dtype
) -> QuantizedArray:
    """Read a quantized weight onto the host.

    Args:
        files: maps each tensor name to its file.
        name: name of the weight.
        shape: its unquantized shape, `[out, in]`.
        dtype: dtype of the dequantized weight.

    Raises:
        UserError: block sizes, a shape or arrays that do not fit.
    """
    prefix = f"{name}."
    state = {
        part.removeprefix(prefix): read_tensor(files[part], part)
        for part in files
        if part.startswith(prefix)
    }
    try:
        found = QuantizedArray.from_bitsandbytes(read_tensor(files[name], name), state, dtype)
    except LoraError as error:
        raise UserError(f"{files[name]}: {name}: {error}") from None
    stored = found.shape[::-1]
    if stored != shape:
        raise UserError(
            f"{files[name]}: {name}: shape {list(stored)}, config.json asks {list(shape)}"
        )
    return found
