"""Write a complete model folder: weights, config, tokenizer, template, generation settings."""

from __future__ import annotations

from pathlib import Path

import lora_flax
from phi3_jax.checkpoint.saving import save, untie
from phi3_jax.errors import UserError
from phi3_jax.model.network import Phi3

# A checkpoint's files other than its weights and config.json; no code, no pickle.
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def merge_adapter(model: Phi3) -> None:
    """`lora_flax.merge_and_unload` that also handles tied and quantized models.

    A quantized base is dequantized first, so the merged model matches what was trained rather than
    the checkpoint before rounding.

    If only the embedding or only the head of a tied model was trained, one table cannot hold both,
    so the model gets a separate head (see `untie`). PEFT's merged model gives different logits in
    this case (huggingface/peft#2777).

    Raises:
        lora_flax.LoraError: no adapter, or an update that cannot be merged into a weight.
    """
    lora_flax.dequantize(model)
    lora_flax.merge_and_unload(model)
    untie(model)


def save_merged(model: Phi3, directory: Path, base: Path, max_shard_size: int = 5 * 10**9) -> None:
    """Write a plain model with all the files transformers and inference servers need.

    Args:
        model: the merged, unwrapped model.
        directory: output folder; created if missing.
        base: folder of the base model; its tokenizer, template and generation settings are copied
            unchanged.
        max_shard_size: maximum bytes per file.

    Raises:
        UserError: the model still has wrappers, or `directory` is the base's own folder.
    """
    if directory.resolve() == base.resolve():
        raise UserError(f"{directory} is the base model's own folder; choose another output folder")
    directory.mkdir(parents=True, exist_ok=True)
    for name in _BESIDE:
        if (base / name).is_file():
            lora_flax.write_atomically(directory / name, (base / name).read_bytes())
    # config.json last: a folder without it does not count as a model.
    save(model, directory, max_shard_size)
