"""Turn rows into examples, counting every row that is left out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from phi3_jax.config.data import DataConfig
from phi3_jax.data.columns import parse
from phi3_jax.data.masks import Example, encode
from phi3_jax.data.reading import Source, read_rows
from phi3_jax.data.rows import RowError
from phi3_jax.errors import UserError


@dataclasses.dataclass
class DataReport:
    """Statistics on how the rows of one split were processed.

    Attributes:
        rows: rows read.
        examples: rows that became examples.
        cut: examples that were longer than `max_length`.
        dropped: rows with nothing left to learn after truncation.
        skipped: malformed rows (`on_bad_row: skip`).
        tokens, target_tokens: totals over all examples.
    """

    rows: int = 0
    examples: int = 0
    cut: int = 0
    dropped: int = 0
    skipped: int = 0
    tokens: int = 0
    target_tokens: int = 0

    def __str__(self) -> str:
        parts = [
            f"{self.examples:,} examples of {self.rows:,} rows",
            f"{self.tokens:,} tokens, {self.target_tokens:,} of them learned",
        ]
        parts += [
            f"{count:,} {what}"
            for count, what in (
                (self.cut, "cut to max_length"),
                (self.dropped, "dropped: nothing to learn within max_length"),
                (self.skipped, "skipped: malformed"),
            )
            if count
        ]
        return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split, and statistics on its rows."""

    examples: list[Example]
    report: DataReport

    def fingerprint(self) -> str:
        """A digest of the examples, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(example.tokens.tobytes())
            digest.update(np.packbits(example.targets).tobytes())
        return digest.hexdigest()


def load_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Split, Split | None]:
    """Load training examples and, if configured, held-out ones.

    Raises:
        UserError: data not found, a malformed row (with file and line), or no examples at all.
    """
    train = read_rows(config.path, config.name, config.split)
    test: list[Source] | None = None
    if config.test_path is not None:
        test = read_rows(config.test_path, None, "train")
    elif config.test_split is not None:
        test = read_rows(config.path, config.name, config.test_split)
    elif config.test_size is not None:
        train, test = _hold_out(train, config.test_size, config.split_seed)
    train_split = _encode_rows(train[: config.max_samples], config, tokenizer, "train")
    if test is None:
        return train_split, None
    return train_split, _encode_rows(test[: config.max_test_samples], config, tokenizer, "held-out")


def _hold_out(
    rows: list[Source], test_size: float | int, seed: int
) -> tuple[list[Source], list[Source]]:
    """Split like `datasets.Dataset.train_test_split`, so known recipes hold out the same rows."""
    numbers = datasets.Dataset.from_dict({"row": list(range(len(rows)))})
    try:
        parts = numbers.train_test_split(test_size=test_size, seed=seed)
    except ValueError as error:
        raise UserError(f"data.test_size {test_size} of {len(rows)} rows: {error}") from None
    return [rows[i] for i in parts["train"]["row"]], [rows[i] for i in parts["test"]["row"]]


def _encode_rows(
    rows: Sequence[Source], config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: str
) -> Split:
    report = DataReport(rows=len(rows))
    examples = []
    for source in rows:
        try:
            if source.problem:
                raise RowError(source.problem)
            row = parse(source.row, config.format)
            example = encode(row, tokenizer, config.assistant_only_loss)
        except RowError as error:
            if config.on_bad_row == "skip":
                report.skipped += 1
                continue
            raise UserError(
                f"{source.where}: {error} (data.on_bad_row: skip leaves such rows out)"
            ) from None
        if len(example.tokens) > config.max_length:
            tokens, targets = example.tokens, example.targets
            example = Example(tokens[: config.max_length], targets[: config.max_length])
            if not example.targets.any():
                report.dropped += 1
                continue
            report.cut += 1
        report.tokens += len(example.tokens)
        report.target_tokens += int(example.targets.sum())
        examples.append(example)
    report.examples = len(examples)
    if not examples:
        raise UserError(f"no {split} example is left of {config.path}: {report}")
    return Split(examples, report)
