"""The checkpoint's own tokenizer, from its folder."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerBase

from phi3_jax.errors import UserError


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load the checkpoint's own tokenizer from its local folder, without running remote code.

    Raises:
        UserError: no tokenizer found, or one that does not support character offsets.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"{directory}: cannot load a tokenizer ({first_line})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: a tokenizer.json is needed (a 'fast' tokenizer)")
    return tokenizer
