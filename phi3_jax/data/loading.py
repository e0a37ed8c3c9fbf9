"""The data of a run, in either of the two ways to read it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from phi3_jax.config.data import DataConfig
from phi3_jax.data import dataset, streaming
from phi3_jax.data.dataset import Split


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Split, Split | None]:
    """Training and, if configured, held-out examples; of streamed ones only the first.

    Raises:
        UserError: data not found, a malformed row (with file and line), or no examples at all.
    """
    if config.streaming:
        return streaming.load_streamed(config, tokenizer)
    return dataset.load_examples(config, tokenizer)


def load_held_out(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Split | None:
    """The held-out examples alone, if configured; the training rows are not tokenized.

    Raises:
        UserError: as in `load_data`.
    """
    if config.streaming:
        return streaming.load_held_out(config, tokenizer)
    return dataset.load_held_out(config, tokenizer)
