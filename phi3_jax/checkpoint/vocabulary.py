"""Rows of the embedding and the head for tokens that the checkpoint does not have."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors

import lora_flax
from lora_flax import LoraConfig
from phi3_jax.errors import UserError
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3

# What a PEFT adapter's folder holds.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def add_token_rows(model: Phi3, ids: Sequence[int]) -> None:
    """Give new tokens their rows, in place; the embedding and the head grow if they have too few.

    Each new row is the mean of the rows before the first new token, so that new tokens start out
    as likely as an average one (Hewitt 2021). transformers' `mean_resizing` does the same, with
    noise of variance 1e-9.

    Args:
        model: a model without an adapter.
        ids: the ids of the new tokens, which follow those of the known ones.

    Raises:
        UserError: there are tokens without a row before the first new one.
    """
    first, stop = min(ids), max(ids) + 1
    if first > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {first} tokens before the new ones, but the model's vocabulary "
            f"size is {model.config.vocab_size}; is this another model's tokenizer?"
        )
    embedding: Any = model.model.embed_tokens
    embedding.embedding.set_value(_with_mean_rows(embedding.embedding[...], first, stop))
    if not model.config.tie_word_embeddings:
        head: Any = model.lm_head
        head.kernel.set_value(_with_mean_rows(head.kernel[...].T, first, stop).T)
    match_vocabulary(model)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _with_mean_rows(table: jax.Array, first: int, stop: int) -> jax.Array:
    """The table `[V, D]` with the mean of the rows before `first` as rows `first` to `stop`."""
    mean = table[:first].astype(jnp.float32).mean(axis=0).astype(table.dtype)
    new = jnp.broadcast_to(mean, (stop - first, table.shape[1]))
    return jnp.concatenate([table[:first], new, table[stop:]])


def load_adapter(model: Phi3, adapter: str | Path) -> lora_flax.Report:
    """Load a PEFT adapter into a model, whose embedding and head get as many rows as it has.

    Args:
        model: a model without an adapter.
        adapter: folder of the adapter.

    Raises:
        UserError, lora_flax.LoraError: the adapter does not match the model.
    """
    old, rows = model.config.vocab_size, rows_with(model.config, Path(adapter))
    if rows > old:
        # A start for what the adapter's file has: its rows, or a whole embedding and head.
        add_token_rows(model, range(old, rows))
    else:
        _cut_rows(model, Path(adapter))
    report = lora_flax.load_peft(model, adapter)
    match_vocabulary(model)
    return report


def _cut_rows(model: Phi3, adapter: Path) -> None:
    """Cut the embedding or the head where a file has fewer rows of the other one alone.

    If the embedding or the head of a model that was resized to fewer rows has an update, PEFT saves
    the base of that one only.
    """
    whole = _whole_rows(adapter / ADAPTER_WEIGHTS) if not model.config.tie_word_embeddings else {}
    rows = max(whole.values(), default=0)
    if not 0 < rows < model.config.vocab_size or all(whole.values()):
        return
    embedding: Any = model.model.embed_tokens
    head: Any = model.lm_head
    if whole[EMBEDDING]:
        head.kernel.set_value(head.kernel[...][:, :rows])
    else:
        embedding.embedding.set_value(embedding.embedding[...][:rows])


def match_vocabulary(model: Phi3) -> None:
    """Set `vocab_size` to the rows of the embedding, which an adapter may have resized."""
    embedding: Any = model.model.embed_tokens
    rows = getattr(embedding, "plain", embedding).embedding[...].shape[0]
    head: Any = getattr(model.lm_head, "plain", model.lm_head)
    if model.config.tie_word_embeddings:
        head.tied_shape = (model.config.hidden_size, rows)
    model.config = model.model.config = dataclasses.replace(model.config, vocab_size=rows)


def with_tokens(lora: LoraConfig, ids: Sequence[int], config: Phi3Config) -> LoraConfig:
    """The LoRA config that also trains the rows of new tokens, of the embedding and of the head.

    A module that trains in full has them already, and the head of a tied model uses the rows of
    the embedding.

    Args:
        lora: what else is trained.
        ids: ids of the new tokens.
        config: the network.

    Raises:
        UserError: only one of a tied embedding and head trains in full.
    """
    saved = tuple(lora.modules_to_save or ())
    whole = [module for module in (EMBEDDING, HEAD) if module.endswith(saved)]
    if config.tie_word_embeddings and len(whole) == 1:
        raise UserError(
            "peft.modules_to_save: with data.add_tokens on a model with tied embeddings, list "
            f"both embed_tokens and lm_head, or neither, not {whole[0]} alone"
        )
    tokens = _tokens_by_module(lora)
    own_head = bool(tokens.get(HEAD)) or not config.tie_word_embeddings
    for module in (EMBEDDING, HEAD) if own_head else (EMBEDDING,):
        tokens[module] = [*tokens.get(module, []), *ids]
    tokens = {module: own for module, own in tokens.items() if module not in whole}
    return LoraConfig(**lora.to_json() | {"trainable_token_indices": tokens or None})


def _tokens_by_module(lora: LoraConfig) -> dict[str, list[int]]:
    """`trainable_token_indices` by the modules' full names; names of other modules stay."""
    tokens: Any = lora.to_json()["trainable_token_indices"]
    if not isinstance(tokens, dict):
        return {EMBEDDING: list(tokens)} if tokens else {}
    found: dict[str, list[int]] = {}
    for name, ids in tokens.items():
        full = next((m for m in (EMBEDDING, HEAD) if f".{m}".endswith(f".{name}")), name)
        found[full] = [*found.get(full, []), *ids]
    return found


def rows_with(config: Phi3Config, adapter: Path) -> int:
    """The rows that the embedding has with an adapter, which may have new tokens.

    If a resized embedding or head has an update, PEFT saves the base of that one only. The rows of
    the other are then those of `add_token_rows`, with a warning: the file does not have them.

    Raises:
        UserError: the adapter has rows for new tokens, but not all of them.
        lora_flax.LoraError: its config cannot be read.
    """
    weights, rows = adapter / ADAPTER_WEIGHTS, config.vocab_size
    if not weights.is_file():
        return rows  # loading says what is wrong with it
    lora, modules = lora_flax.read_peft_config(adapter), (EMBEDDING, HEAD)
    tokens, whole = _tokens_by_module(lora), _whole_rows(weights)
    wanted = max([rows, *whole.values(), *(i + 1 for m in modules for i in tokens.get(m, []))])
    # Counted, not listed: a damaged file may have any number as a token's id.
    new = {m: len({i for i in tokens.get(m, ()) if i >= rows}) for m in modules}
    held = {m: whole[m] >= wanted or new[m] == wanted - rows for m in modules}
    if config.tie_word_embeddings:
        # The base weight may have either name; a head that trains in full has one of its own.
        if whole[HEAD] and not HEAD.endswith(tuple(lora.modules_to_save or ())):
            held[EMBEDDING] = held[EMBEDDING] or held[HEAD]
        if not whole[EMBEDDING]:
            held[HEAD] = held[HEAD] or held[EMBEDDING]
    lacking = [module for module in modules if not held[module]]
    if lacking and max(whole.values()) == wanted:
        warnings.warn(
            f"{adapter} has no rows of {lacking[0]} for tokens {rows} to {wanted - 1}: here they "
            "are the mean of the others. To use the resized model's own rows, give that model as "
            "the base",
            stacklevel=2,
        )
    elif lacking:
        raise UserError(
            f"{adapter}: it needs an embedding of {wanted} rows and the base model has {rows}, but "
            f"it does not hold all new rows of {' and '.join(lacking)}; is it of another model?"
        )
    return wanted


def _whole_rows(weights: Path) -> dict[str, int]:
    """Rows of the embedding and of the head that a file holds in full; 0 for none."""
    found = {EMBEDDING: 0, HEAD: 0}
    with (
        # Loading says what is wrong.
        contextlib.suppress(safetensors.SafetensorError, FileNotFoundError),
        safetensors.safe_open(str(weights), "numpy") as file,
    ):
        for key in list(file.keys()):
            name = key.removeprefix("base_model.model.")
            module = next((m for m in found if name.startswith(f"{m}.")), None)
            if module is not None and name.endswith("weight") and ".lora_" not in name:
                found[module] = int(file.get_slice(key).get_shape()[0])
    return found
