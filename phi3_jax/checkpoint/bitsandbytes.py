"""Pre-quantized checkpoints: bitsandbytes' 4-bit format, as transformers saves it.

Such a file stores the codes of each quantized weight as `NAME.weight`, and the arrays and settings
that `lora_flax.QuantizedArray.from_bitsandbytes` reads as `NAME.weight.*`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lora_flax import BitsAndBytesConfig, LoraError, QuantizedArray
from phi3_jax.checkpoint.index import Index
from phi3_jax.errors import UserError

# Followed by the quantization type, such as `nf4`.
_STATE = ".quant_state.bitsandbytes__"


def parse_quantization(raw: dict[str, Any], file: Path) -> BitsAndBytesConfig:
    """Parse quantization settings as transformers writes them.

    Args:
        raw: the `quantization_config` of a config.json.
        file: where it was read from, for the error message.

    Raises:
        UserError: settings that are not supported.
    """
    known = {field.name for field in dataclasses.fields(BitsAndBytesConfig)}
    # transformers writes null when the head is skipped by default.
    given = {name: value for name, value in raw.items() if name in known and value is not None}
    # Compute uses the activations' dtype.
    given.pop("bnb_4bit_compute_dtype", None)
    try:
        return BitsAndBytesConfig(**given)
    except (LoraError, TypeError) as error:
        raise UserError(f"{file}: quantization: {error}") from None


def quantized_tensors(names: Iterable[str]) -> set[str]:
    """The names of the weights stored in 4 bits, given the names of a checkpoint's tensors."""
    return {name.partition(_STATE)[0] for name in names if _STATE in name}


def is_part(name: str, quantized: set[str]) -> bool:
    """Whether a tensor belongs to one of those weights without being its codes."""
    weight, dot, _ = name.partition(".weight.")
    return bool(dot) and f"{weight}.weight" in quantized


def read_quantized(
    index: Index, name: str, shape: tuple[int, ...], dtype: jnp.dtype
) -> QuantizedArray:
    """Read a quantized weight onto the host.

    Args:
        index: the tensors of the checkpoint.
        name: name of the weight.
        shape: its unquantized shape, `[out, in]`.
        dtype: dtype of the dequantized weight.

    Raises:
        UserError: block sizes, a shape or arrays that do not match.
    """
    prefix = f"{name}."
    state = {
        part.removeprefix(prefix): tensor.read()
        for part, tensor in index.items()
        if part.startswith(prefix)
    }
    try:
        found = QuantizedArray.from_bitsandbytes(index[name].read(), state, dtype)
    except LoraError as error:
        raise UserError(f"{index[name].file}: {name}: {error}") from None
    stored = found.shape[::-1]
    if stored != shape:
        raise UserError(
            f"{index[name].file}: {name}: shape {list(stored)}, config.json expects {list(shape)}"
        )
    return found
