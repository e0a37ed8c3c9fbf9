"""Rows to tokens, many at a time: what a worker process does with a chunk."""

from __future__ import annotations

import array
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from phi3_jax.data.columns import parse
from phi3_jax.data.masks import Draft, Learning, Tokens, draft, tokenize
from phi3_jax.data.rendering import ChatTemplate
from phi3_jax.data.rows import Chat, RowError, Source
from phi3_jax.data.spans import Layouts
from phi3_jax.data.token_rows import row_digest
from phi3_jax.data.words import WordTokenizer

# A row of the token cache. A bad row has `kind` and `problem`, and no tokens.
SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),  # not truncated
        ("learned", pa.list_(pa.int32())),  # starts and stops in turn
        ("place", pa.string()),  # in the file: `:12`
        ("kind", pa.string()),
        ("problem", pa.string()),
        ("note", pa.string()),  # JSON: columns renamed, and what was not used
        ("digest", pa.int64()),  # of tokens and learned
        ("content", pa.int64()),  # digest of tokens alone
        ("largest", pa.int32()),  # token id
    ]
)


@dataclasses.dataclass(frozen=True)
class EncoderSettings:
    """What decides a row's tokens: the keys of the same names in the config's section `data`."""

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    assistant_only_loss: bool = True
    train_on: Literal["all", "last"] = "all"
    assistant_first: Literal["learn", "refuse"] = "learn"

    @property
    def learning(self) -> Learning:
        """Which tokens are learned."""
        return Learning(self.assistant_only_loss, self.train_on, self.assistant_first)


class Encoder:
    """Tokenizes rows with one tokenizer and one set of settings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings) -> None:
        self.settings = settings
        self.template = ChatTemplate(tokenizer)
        self.layouts = Layouts(self.template)
        self.words = WordTokenizer.of(tokenizer.backend_tokenizer)

    def encode(self, sources: Sequence[Source]) -> pa.RecordBatch:
        """The rows as a batch of `SCHEMA`.

        Raises:
            UserError: the tokenizer has no chat template, or no end token, and a row needs it.
        """
        drafts: list[Draft] = []
        found: list[RowError | None] = []
        notes: list[str] = []
        for source in sources:
            try:
                one, note = self._draft(source)
            except RowError as error:
                found.append(error)
                notes.append("")
            else:
                found.append(None)
                notes.append(note)
                drafts.append(one)
        tokenized = iter(tokenize(drafts, self.template.tokenizer, self.words))
        rows = [error or next(tokenized) for error in found]
        return _batch(sources, rows, notes)

    def _draft(self, source: Source) -> tuple[Draft, str]:
        """One row, ready to be tokenized, and what of it was renamed or not used.

        Raises:
            RowError: whatever is wrong with it.
        """
        if source.problem:
            raise RowError(source.problem, "unreadable")
        settings = self.settings
        try:
            parsed = parse(source.row, settings.format, settings.columns)
            row, unread = parsed.row, set[str]()
            if isinstance(row, Chat):
                row = self.template.prepare(row)
                unread = self.template.unread_keys(row)
            one = draft(row, self.template, settings.learning, self.layouts)
        except RecursionError:
            raise RowError("nested too deeply") from None
        renamed, named = (tuple(sorted(of.items())) for of in (parsed.renamed, parsed.named))
        return one, _note(renamed, parsed.unused | unread, named)


@functools.lru_cache(maxsize=1024)
def _note(
    renamed: tuple[tuple[str, str], ...],
    unused: frozenset[str],
    named: tuple[tuple[str, bool], ...],
) -> str:
    """A row's `Note` as JSON; empty if there is nothing to say."""
    if not renamed and not unused and not named:
        return ""
    pairs = [(ours, _printable(theirs)) for ours, theirs in renamed]
    unused_names = sorted(map(_printable, unused))
    return json.dumps({"renamed": pairs, "unused": unused_names, "named": named})


def _batch(
    sources: Sequence[Source], rows: Sequence[Tokens | RowError], notes: Sequence[str]
) -> pa.RecordBatch:
    tokens, learned = bytearray(), bytearray()
    token_ends, learned_ends = [0], [0]
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names[2:]}
    for source, row, note in zip(sources, rows, notes, strict=True):
        error = row if isinstance(row, RowError) else None
        good = Tokens(np.zeros(0, np.int32), []) if isinstance(row, RowError) else row
        ids = good.ids.tobytes()
        runs = array.array("i", [edge for run in good.learned for edge in run]).tobytes()
        tokens += ids
        learned += runs
        token_ends.append(len(tokens) // 4)
        learned_ends.append(len(learned) // 4)
        columns["place"].append(source.where)
        columns["kind"].append(error and error.kind)
        columns["problem"].append(error and _printable(str(error)))
        columns["note"].append(note)
        columns["digest"].append(row_digest(ids, runs))
        columns["content"].append(row_digest(ids))
        columns["largest"].append(int(good.ids.max(initial=0)))
    arrays = [_lists(token_ends, tokens), _lists(learned_ends, learned)]
    arrays += [pa.array(columns[name], SCHEMA.field(name).type) for name in columns]
    return pa.record_batch(arrays, schema=SCHEMA)


def _lists(ends: list[int], values: bytearray) -> pa.ListArray:
    flat = pa.Array.from_buffers(pa.int32(), ends[-1], [None, pa.py_buffer(bytes(values))])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat)


def _printable(text: str) -> str:
    """Text that may quote a lone surrogate, which neither Arrow nor a terminal takes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
