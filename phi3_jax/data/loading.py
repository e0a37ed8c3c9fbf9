"""The data of a run, in either of the two ways to read it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from phi3_jax.config.data import DataConfig
from phi3_jax.data.dataset import Split, load_examples
from phi3_jax.data.streaming import load_streamed


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Split, Split | None]:
    """Training and, if configured, held-out examples; of streamed ones only the first.

    Raises:
        UserError: data not found, a malformed row (with file and line), or no examples at all.
    """
    return (load_streamed if config.streaming else load_examples)(config, tokenizer)
