"""The quantization of an adapter's base, saved next to the adapter and restored with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import lora_flax
from lora_flax import BitsAndBytesConfig
from phi3_jax.checkpoint.bitsandbytes import parse_quantization
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.checkpoint.saving import write_json
from phi3_jax.model.config import read_json_object
from phi3_jax.model.network import Phi3

# The base's quantization settings, as in a config.json.
QUANTIZATION_FILE = "quantization_config.json"


def load_with_adapter(base: Checkpoint, adapter: Path | None, dtype: jnp.dtype | str) -> Phi3:
    """Load a base with an adapter, quantized the way it was when the adapter was trained.

    Args:
        base: the base model.
        adapter: folder of the adapter; None loads the base alone.
        dtype: dtype of the weights.

    Raises:
        UserError, lora_flax.LoraError: as in `Checkpoint.load`, or the adapter does not match
            the model.
    """
    quantization = None
    if adapter is not None and base.quantization is None:
        quantization = read_quantization(adapter)
    model = base.load(dtype, quantization=quantization)
    if adapter is not None:
        lora_flax.load_peft(model, adapter)
        match_vocabulary(model)
    return model


def match_vocabulary(model: Phi3) -> None:
    """Set `vocab_size` to the rows of the embedding, which an adapter's file may have resized."""
    embedding: Any = model.model.embed_tokens
    rows = getattr(embedding, "plain", embedding).embedding[...].shape[0]
    model.config = model.model.config = dataclasses.replace(model.config, vocab_size=rows)


def write_quantization(quantization: BitsAndBytesConfig, adapter: Path) -> None:
    """Save the base's quantization settings next to an adapter."""
    write_json(quantization.to_json(), adapter / QUANTIZATION_FILE)


def read_quantization(adapter: Path) -> BitsAndBytesConfig | None:
    """The quantization settings of an adapter's base, or None.

    Raises:
        UserError: the file does not hold quantization settings.
    """
    file = adapter / QUANTIZATION_FILE
    return parse_quantization(read_json_object(file), file) if file.exists() else None
