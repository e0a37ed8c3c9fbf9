"""Streamed training rows with held-out ones: what a run needs of them before its first step."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from phi3_jax.config.data import DataConfig, SourceConfig
from phi3_jax.data.blocks import Blocks
from phi3_jax.data.cache import TokenCache, open_cache
from phi3_jax.data.chunks import without_nulls
from phi3_jax.data.dataset import Split, cache_root, to_split, together, tokenize
from phi3_jax.data.files import DataFile
from phi3_jax.data.reading import Found, find_files, held_out_split, is_hub_id
from phi3_jax.data.row_streams import Share, hub_errors, open_hub
from phi3_jax.data.selection import Selection, all_rows, first_rows, held_out_source
from phi3_jax.data.stream import Stream

# Rows that are looked at before the first step, to find mistakes early.
SAMPLE = 256


def load_streamed(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Split, Split | None]:
    """Find the training rows and look at the first ones; load the held-out rows, if configured.

    Returns:
        The first rows, with the stream that all of them come from; and the held-out rows.

    Raises:
        UserError: data not found, a malformed row (with file and line), or no examples.
    """
    with open_cache(cache_root(config)) as cache:
        parts = _held_out(config, cache)
        test = _read(parts, config, tokenizer, cache)
        contents = np.zeros(0, np.int64) if test is None else test.contents()
        files = _sizes(parts) if config.test_path is not None else {}
    stream = Stream.find(config, tokenizer, contents, files)
    size = min(SAMPLE, config.shuffle_buffer_size)
    with contextlib.closing(Blocks(stream, Share(), None, size)) as blocks:
        first = next(blocks)
    return Split(first.examples, first.report, first.bad_rows, stream), test


def load_held_out(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Split | None:
    """The held-out examples alone, if configured; arguments and errors as in `load_streamed`."""
    with open_cache(cache_root(config)) as cache:
        return _read(_held_out(config, cache), config, tokenizer, cache)


def _read(
    parts: list[Selection],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    cache: TokenCache,
) -> Split | None:
    parts = first_rows(parts, config.max_test_samples)
    rows = tokenize(parts, config, tokenizer, cache)
    return to_split(parts, together(rows), config, "held-out") if parts else None


def _sizes(parts: list[Selection]) -> dict[str, int]:
    """Of each file with rows, the digest and the bytes."""
    files = [counted for part in parts for counted in part.files if counted.rows]
    return {counted.digest: counted.file.path.stat().st_size for counted in files}


def _held_out(config: DataConfig, cache: TokenCache) -> list[Selection]:
    """The held-out rows of each data set; they are read as a whole."""
    wanted: list[tuple[SourceConfig, str]] = []
    if config.test_path is not None:
        source = held_out_source(config)
        wanted.append((source, held_out_split(config.test_path)))
    if config.test_split is not None:
        wanted += [(source, config.test_split) for source in config.data_sets]
    parts = []
    for source, split in wanted:
        if is_hub_id(source.path):
            found = _from_hub(source, split, config.max_test_samples, cache.scratch)
        else:
            found = find_files(source.path, source.name, split, scratch=cache.scratch)
        parts.append(all_rows(source, found, [cache.count(file) for file in found.files]))
    return parts


def _from_hub(source: SourceConfig, split: str, count: int | None, scratch: Path) -> Found:
    """A split of a data set on the hub, of which only the rows themselves are downloaded."""
    digest = hashlib.sha256(f"{source.path} {source.name} {split}".encode()).hexdigest()[:16]
    file = scratch / f"{digest}.jsonl"
    with hub_errors(source.path), file.open("w", encoding="utf-8") as out:
        table = open_hub(source, split)
        for row in itertools.islice(table, count):
            out.write(json.dumps(without_nulls(row, table.features), default=repr) + "\n")
    return Found(source.path, [DataFile(file, f"{source.path} {split}")], "train")
