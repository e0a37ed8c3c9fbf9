"""What a run streams: its sources, found but not read yet."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping

import numpy as np
from transformers import PreTrainedTokenizerBase

from phi3_jax.config.data import DataConfig
from phi3_jax.data.mixing import short_names
from phi3_jax.data.row_streams import Position, RowStream, Share, open_streams
from phi3_jax.data.tokenizer import digest_tokenizer


@dataclasses.dataclass(frozen=True)
class Stream:
    """What is streamed, found but not read yet.

    Attributes:
        config: the config's section.
        tokenizer: the tokenizer.
        names: what metrics call the sources.
        open_rows: opens each source for a share at a position.
        identity: what decides the rows, whatever folder they are in; held-out rows are left out.
        held_out: int64, `contents` of the held-out rows, which are never trained on.
        vocab_size: token ids are below this; None checks nothing.
    """

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    names: tuple[str, ...]
    open_rows: tuple[Callable[[Share, Position | None], RowStream], ...]
    identity: str
    held_out: np.ndarray
    vocab_size: int | None = None

    @classmethod
    def find(
        cls,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        held_out: np.ndarray,
        held_out_files: Mapping[str, int],
    ) -> Stream:
        """Find the sources of a config.

        Args:
            config: the config's section.
            tokenizer: the tokenizer.
            held_out: int64, `contents` of the held-out rows.
            held_out_files: files that are not streamed, digests to bytes.

        Raises:
            UserError: one is not found, cannot be streamed, or is held out as a whole.
        """
        sources, seed = config.data_sets, config.split_seed
        found = [open_streams(source, seed, held_out_files) for source in sources]
        names = short_names([source.path for source in sources])
        digests = [digest_tokenizer(tokenizer), hashlib.sha256(held_out.tobytes()).hexdigest()]
        identity = repr([*digests, *(identity for identity, _ in found)])
        opened = tuple(open_rows for _, open_rows in found)
        return cls(config, tokenizer, names, opened, identity, held_out)
