"""A whole model folder: weights, config, tokenizer, template and generation settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

import lora_flax
from lora_flax.layers.trained_whole import TrainedCopy
from phi3_jax.checkpoint.weights import save
from phi3_jax.errors import UserError
from phi3_jax.model.network import Dense, Phi3

# What a checkpoint holds beside its weights and config.json; no code, no pickle.
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
    """`lora_flax.merge_and_unload`, right for tied models and quantized ones too.

    A quantized base is dequantized first: the merged model is what was trained, not what the
    checkpoint was before it was rounded.

    Where the embedding of a tied model was trained by itself (as a target of LoRA, or whole), its
    head goes on reading the base's table. One table cannot hold both: the model gets a head of its
    own, and `tie_word_embeddings` becomes false. PEFT's merged model gives other logits there
    (huggingface/peft#2777).

    Raises:
        lora_flax.LoraError: no adapter, or an update that no weight can hold.
    """
    lora_flax.dequantize(model)
    embedding: Any = model.model.embed_tokens
    apart = isinstance(embedding, lora_flax.LoRAEmbed | TrainedCopy)
    table = embedding.base.embedding[...] if apart else None
    lora_flax.merge_and_unload(model)
    if not model.config.tie_word_embeddings or table is None:
        return
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    head = nnx.eval_shape(lambda: Dense(table.shape[::-1], 0.0, table.dtype, nnx.Rngs(0)))
    head.kernel.set_value(table.T)
    model.lm_head, model.config, model.model.config = head, config, config


def save_merged(model: Phi3, directory: Path, base: Path, max_shard_size: int = 5 * 10**9) -> None:
    """Writes a plain model with everything that transformers and servers want beside it.

    Args:
        model: merged and unwrapped.
        directory: made if absent.
        base: folder of the base model, whose tokenizer, template and generation settings are
            copied as they are.
        max_shard_size: bytes of one file.

    Raises:
        UserError: the model has wrappers, or the folder is the base's own.
    """
    if directory.resolve() == base.resolve():
        raise UserError(f"{directory} is the base model itself; give another folder")
    directory.mkdir(parents=True, exist_ok=True)
    for name in _BESIDE:
        if (base / name).is_file():
            lora_flax.write_atomically(directory / name, (base / name).read_bytes())
    # config.json last: a folder without it is no model.
    save(model, directory, max_shard_size)
