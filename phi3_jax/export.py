"""A whole model folder: weights, config, tokenizer, template and generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path

from phi3_jax.errors import UserError
from phi3_jax.model import Phi3
from phi3_jax.weights import save

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
            shutil.copyfile(base / name, directory / name)
    # config.json last: a folder without it is no model.
    save(model, directory, max_shard_size)
