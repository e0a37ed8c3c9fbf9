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
from phi3_jax.data.masks import Example, Learning, encode
from phi3_jax.data.reading import held_out_split, read_rows
from phi3_jax.data.rendering import ChatTemplate
from phi3_jax.data.report import DataReport
from phi3_jax.data.rows import Chat, RowError, Source
from phi3_jax.errors import UserError


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
        test = read_rows(config.test_path, None, held_out_split(config.test_path))
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
    template = ChatTemplate(tokenizer)
    examples = []
    for source in rows:
        try:
            example = _encode_row(source, config, template, report)
        except RowError as error:
            if config.on_bad_row == "error":
                raise UserError(
                    f"{source.where}: {error} (data.on_bad_row: skip skips such rows)"
                ) from None
            report.skip(error.kind, source.where)
            continue
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
        raise UserError(f"no {split} examples left in {config.path}: {report}")
    return Split(examples, report)


def _encode_row(
    source: Source, config: DataConfig, template: ChatTemplate, report: DataReport
) -> Example:
    """One row as an example; what of it was renamed or not used is noted in the report.

    Raises:
        RowError: whatever is wrong with it.
    """
    if source.problem:
        raise RowError(source.problem, "unreadable")
    learning = Learning(config.assistant_only_loss, config.train_on, config.assistant_first)
    try:
        parsed = parse(source.row, config.format, config.columns)
        row, unread = parsed.row, set[str]()
        if isinstance(row, Chat):
            row = template.prepare(row)
            unread = template.unread_keys(row)
        example = encode(row, template, learning)
    except RecursionError:
        raise RowError("nested too deeply") from None
    report.note(parsed.renamed, parsed.unused | unread)
    return example
