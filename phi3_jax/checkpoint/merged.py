"""Write a complete model folder: weights, config, tokenizer, template, generation settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

import lora_flax
from phi3_jax.checkpoint.saving import save
from phi3_jax.errors import UserError
from phi3_jax.model.network import Dense, Phi3

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

    If only the embedding of a tied model was trained (as a LoRA target, or in full), its head still
    reads the base's table. One table cannot hold both, so the model gets a separate head and
    `tie_word_embeddings` becomes false. PEFT's merged model gives different logits in this case
    (huggingface/peft#2777).

    Raises:
        lora_flax.LoraError: no adapter, or an update that cannot be merged into a weight.
    """
    lora_flax.dequantize(model)
    embedding: Any = model.model.embed_tokens
    apart = isinstance(embedding, lora_flax.LoRAEmbed | lora_flax.TrainedCopy)
    table = embedding.base.embedding[...] if apart else None
    lora_flax.merge_and_unload(model)
    if not model.config.tie_word_embeddings or table is None:
        return
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    head = nnx.eval_shape(lambda: Dense(table.shape[::-1], 0.0, table.dtype, nnx.Rngs(0)))
    head.kernel.set_value(table.T)
    model.lm_head, model.config, model.model.config = head, config, config


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
