"""Reads adapters in Hugging Face PEFT's format into a model."""

from __future__ import annotations

import os
from pathlib import Path as FilePath

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax import nnx

from lora_flax.config import DEFAULT, LoraConfig
from lora_flax.errors import LoraError, at_most_ten
from lora_flax.index import ModelIndex
from lora_flax.peft.config_file import read_config
from lora_flax.peft.insert import insert_tensors
from lora_flax.peft.saving import CONFIG_FILE, WEIGHTS_FILE, refuse_nonfinite
from lora_flax.summary import Report, report_on

# Ranks up to this are compared with the tensors' shapes; larger ones might not even be allocated.
_LARGE_RANK = 2**16


def load_peft(
    model: nnx.Module, directory: str | os.PathLike[str], adapter_name: str = DEFAULT
) -> Report:
    """Loads a PEFT adapter into the model, in place, and activates it.

    Nothing is changed unless the entire adapter fits. Names in `target_modules` that match no layer
    are accepted, as in PEFT, which writes them out unchecked; what matters is that the tensors in
    the file are exactly those of the layers that do match. The projections of a fused layer may be
    stored under their own names.

    Args:
        model: plain or wrapped; an existing adapter of that name is replaced if it is compatible.
        directory: contains `adapter_config.json` and `adapter_model.safetensors` (any float dtype).
        adapter_name: name of the adapter in the model.

    Returns:
        What is wrapped, in the same form as `wrap` returns.

    Raises:
        LoraError: for a folder without these files, unsupported options that change what the
            adapter means (all of them are named), a model that is merged or wrapped differently,
            trained biases in a model where another adapter has some, and for missing,
            unexpected, misshapen or non-finite tensors, all in one message.
    """
    folder = FilePath(directory)
    config = read_peft_config(folder)
    index = ModelIndex(model)
    if any(layer.merged for layer in index.wrappers.values()):
        raise LoraError("the model is merged; unmerge it before loading an adapter")
    tensors = _read_weights(folder / WEIGHTS_FILE)
    _refuse_ranks(config, tensors, folder)
    refuse_nonfinite(tensors, f"{folder / WEIGHTS_FILE} is not loaded")
    insert_tensors(index, config, tensors, adapter_name, str(folder / WEIGHTS_FILE))
    return report_on(index)


def read_peft_config(directory: str | os.PathLike[str]) -> LoraConfig:
    """What an adapter's `adapter_config.json` says, as far as it changes what the adapter means.

    Args:
        directory: folder of a PEFT adapter.

    Raises:
        LoraError: the file is missing or damaged, or uses unsupported options (all are named).
    """
    return read_config(FilePath(directory) / CONFIG_FILE)


def _refuse_ranks(config: LoraConfig, tensors: dict[str, np.ndarray], folder: FilePath) -> None:
    """Refuse ranks that no tensor has before A and B of that size are allocated."""
    rows = max((value.shape[0] for key, value in tensors.items() if _is_a(key, value)), default=0)
    ranks = {"r": config.r}
    ranks |= {f"rank_pattern of {key!r}": rank for key, rank in dict(config.rank_pattern).items()}
    for name, rank in ranks.items():
        if rank > max(rows, _LARGE_RANK):
            raise LoraError(
                f"{folder / CONFIG_FILE}: {name} is {rank}, but A has at most {rows} rows"
            )


def _is_a(key: str, value: np.ndarray) -> bool:
    return value.ndim > 1 and (".lora_A" in key or ".lora_embedding_A" in key)


def _read_weights(file: FilePath) -> dict[str, np.ndarray]:
    if not file.is_file():
        if file.with_suffix(".bin").is_file():
            raise LoraError(
                f"{file.parent} stores its weights as a pickle ({file.stem}.bin), which is not "
                "supported; load it once with PEFT and call save_pretrained to write safetensors"
            )
        raise LoraError(f"{file.parent} has no {file.name}")
    try:
        # The numpy reader does not support bfloat16.
        tensors = safetensors.flax.load_file(str(file))
    except safetensors.SafetensorError as error:
        raise LoraError(f"{file} is damaged: {error}") from error
    odd = [
        f"{key} is {value.dtype}"
        for key, value in sorted(tensors.items())
        if not jnp.issubdtype(value.dtype, jnp.floating)
    ]
    if odd:
        raise LoraError(
            f"{file}: expected floating-point tensors, but {', '.join(at_most_ten(odd))}"
        )
    return {key: np.asarray(value).astype(np.float32) for key, value in tensors.items()}
