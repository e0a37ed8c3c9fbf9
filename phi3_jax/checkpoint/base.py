"""Load a base model for commands and runs: quantized or not, with or without an adapter."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import lora_flax
from lora_flax import BitsAndBytesConfig
from phi3_jax.checkpoint.folder import files_of_tensors, read_tensor, write_json
from phi3_jax.checkpoint.weights import abstract_model, load
from phi3_jax.errors import UserError
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3

# Saved next to an adapter: its base's quantization settings, as in a config.json.
QUANTIZATION_FILE = "quantization_config.json"


def load_base(
    folder: Path,
    dtype: jnp.dtype | str,
    quantization: BitsAndBytesConfig | None = None,
    mesh: Mesh | None = None,
) -> Phi3:
    """Load a base model; a pre-quantized checkpoint keeps its own quantization.

    Raises:
        UserError: not a Phi-3 checkpoint, or quantization was requested for a checkpoint that is
            already quantized.
        lora_flax.LoraError: a weight that cannot be quantized as requested.
    """
    stored = _stored_quantization(folder)
    if stored is not None and quantization is not None:
        raise UserError(f"{folder} is quantized already; leave model.quantization out")
    return load(folder, dtype=dtype, mesh=mesh, quantization=stored or quantization)


def base_bytes(
    folder: Path, dtype: jnp.dtype | str, quantization: BitsAndBytesConfig | None = None
) -> int:
    """Bytes taken by the weights that `load_base` loads, computed from their shapes.

    Raises:
        UserError: not a Phi-3 config.
    """
    config = Phi3Config.from_file(folder / "config.json")
    return model_bytes(abstract_model(config, dtype, _stored_quantization(folder) or quantization))


def model_bytes(model: Phi3) -> int:
    """Bytes of all arrays of a model, which may be abstract shapes."""
    leaves = jax.tree.leaves(nnx.state(model))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def load_with_adapter(folder: Path, adapter: Path | None, dtype: jnp.dtype | str) -> Phi3:
    """Load a base with an adapter, quantized the way it was when the adapter was trained.

    Raises:
        UserError, lora_flax.LoraError: as in `load_base`, or the adapter does not fit.
    """
    quantization = None
    if adapter is not None and _stored_quantization(folder) is None:
        quantization = read_quantization(adapter)
    model = load_base(folder, dtype, quantization)
    if adapter is not None:
        lora_flax.load_peft(model, adapter)
    return model


def kernel_reader(folder: Path) -> Callable[[str], np.ndarray]:
    """A function that reads a layer's kernel `[in, out]` by name, as stored in the folder."""
    files = files_of_tensors(folder)

    def read(name: str) -> np.ndarray:
        return read_tensor(files[f"{name}.weight"], f"{name}.weight").T

    return read


def write_quantization(quantization: BitsAndBytesConfig, adapter: Path) -> None:
    """Save the base's quantization settings next to an adapter."""
    write_json(quantization.to_json(), adapter / QUANTIZATION_FILE)


def read_quantization(adapter: Path) -> BitsAndBytesConfig | None:
    """The quantization settings of an adapter's base, or None.

    Raises:
        UserError: the file does not hold quantization settings.
    """
    file = adapter / QUANTIZATION_FILE
    return _parse(file, _read_json(file)) if file.exists() else None


def _stored_quantization(folder: Path) -> BitsAndBytesConfig | None:
    file = folder / "config.json"
    raw = _read_json(file).get("quantization_config") if file.exists() else None
    return _parse(file, raw) if raw else None


def _parse(file: Path, raw: dict[str, Any]) -> BitsAndBytesConfig:
    known = {field.name for field in dataclasses.fields(BitsAndBytesConfig)}
    # transformers writes null when the head is skipped by default.
    given = {name: value for name, value in raw.items() if name in known and value is not None}
    # Compute uses the activations' dtype.
    given.pop("bnb_4bit_compute_dtype", None)
    try:
        return BitsAndBytesConfig(**given)
    except (lora_flax.LoraError, TypeError) as error:
        raise UserError(f"{file}: quantization: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: a JSON object is expected")
    return raw
