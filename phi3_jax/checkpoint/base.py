"""A base model as commands and runs want it: quantized or not, with or without an adapter."""

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

# Beside an adapter: what its base was quantized with, as in a config.json.
QUANTIZATION_FILE = "quantization_config.json"


def load_base(
    folder: Path,
    dtype: jnp.dtype | str,
    quantization: BitsAndBytesConfig | None = None,
    mesh: Mesh | None = None,
) -> Phi3:
    """A base model; one that is quantized in its folder is loaded as it is.

    Raises:
        UserError: not a Phi-3 checkpoint, or one that is quantized and is to be quantized.
        lora_flax.LoraError: a weight that cannot be quantized so.
    """
    stored = _stored_quantization(folder)
    if stored is not None and quantization is not None:
        raise UserError(f"{folder} is quantized already; leave model.quantization out")
    return load(folder, dtype=dtype, mesh=mesh, quantization=stored or quantization)


def base_bytes(
    folder: Path, dtype: jnp.dtype | str, quantization: BitsAndBytesConfig | None = None
) -> int:
    """What the weights of `load_base` take, from their shapes.

    Raises:
        UserError: no Phi-3 config.
    """
    config = Phi3Config.from_file(folder / "config.json")
    return model_bytes(abstract_model(config, dtype, _stored_quantization(folder) or quantization))


def model_bytes(model: Phi3) -> int:
    """Of all arrays of a model, which may be shapes alone."""
    leaves = jax.tree.leaves(nnx.state(model))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def load_with_adapter(folder: Path, adapter: Path | None, dtype: jnp.dtype | str) -> Phi3:
    """A base with an adapter, quantized as it was when the adapter was trained.

    Raises:
        UserError, lora_flax.LoraError: as `load_base`, and an adapter that does not fit.
    """
    quantization = None
    if adapter is not None and _stored_quantization(folder) is None:
        quantization = read_quantization(adapter)
    model = load_base(folder, dtype, quantization)
    if adapter is not None:
        lora_flax.load_peft(model, adapter)
    return model


def kernel_reader(folder: Path) -> Callable[[str], np.ndarray]:
    """Reads the kernel `[in, out]` of a layer, by its name, as the folder has it."""
    files = files_of_tensors(folder)

    def read(name: str) -> np.ndarray:
        return read_tensor(files[f"{name}.weight"], f"{name}.weight").T

    return read


def write_quantization(quantization: BitsAndBytesConfig, adapter: Path) -> None:
    """Leaves beside an adapter what its base was quantized with."""
    write_json(quantization.to_json(), adapter / QUANTIZATION_FILE)


def read_quantization(adapter: Path) -> BitsAndBytesConfig | None:
    """What the base of an adapter was quantized with, if it was.

    Raises:
        UserError: a file that says nothing of that kind.
    """
    file = adapter / QUANTIZATION_FILE
    return _parse(file, _read_json(file)) if file.exists() else None


def _stored_quantization(folder: Path) -> BitsAndBytesConfig | None:
    file = folder / "config.json"
    raw = _read_json(file).get("quantization_config") if file.exists() else None
    return _parse(file, raw) if raw else None


def _parse(file: Path, raw: dict[str, Any]) -> BitsAndBytesConfig:
    known = {field.name for field in dataclasses.fields(BitsAndBytesConfig)}
    # transformers writes null where the head is left out by default.
    given = {name: value for name, value in raw.items() if name in known and value is not None}
    # The activations' own type is what is computed in.
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
