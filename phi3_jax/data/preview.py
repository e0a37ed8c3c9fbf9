"""What the model will see of a data set: rows token by token, lengths, and what was left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from phi3_jax.data.batches import Batches, fill
from phi3_jax.data.dataset import Split
from phi3_jax.data.examples import CachedExamples
from phi3_jax.data.masks import Example
from phi3_jax.data.rendering import ChatTemplate
from phi3_jax.data.rows import Kind
from phi3_jax.errors import printable

BINS = 12
# How many of the longest and the oddest rows are listed, and of those left out for one reason.
LISTED = 5
LEFT_OUT = 1000


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token.

    Attributes:
        id: token id.
        text: what it adds to the text.
        learned: whether the model learns to predict it.
        special: whether it is a special token.
    """

    id: int
    text: str
    learned: bool
    special: bool


@dataclasses.dataclass(frozen=True)
class SegmentView:
    """One example of a row, and where it comes from."""

    where: str
    pieces: list[Piece]

    @property
    def learned(self) -> int:
        """Learned tokens."""
        return sum(piece.learned for piece in self.pieces)


@dataclasses.dataclass(frozen=True)
class RowView:
    """A row of a batch: its segments, and the padding after them."""

    segments: list[SegmentView]
    padding: int


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Rows that were left out for one kind of reason, and the first of them: place and message."""

    kind: str
    count: int
    first: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Preview:
    """A data set as a run will see it.

    Attributes:
        rows: the first rows of training.
        histogram: number of rows from one length to the next, before truncation.
        padding, cut, learned: the shares of padding positions, of truncated rows, and of learned
            tokens.
        longest, oddest: rows worth a look: place and what is remarkable.
        skipped: rows left out, training and held-out ones, by kind.
        summary: the report of the training rows, and of the held-out ones.
    """

    rows: list[RowView]
    histogram: list[tuple[int, int, int]]
    padding: float
    cut: float
    learned: float
    longest: list[tuple[str, str]]
    oddest: list[tuple[str, str]]
    skipped: list[Skipped]
    summary: list[str]


def look(
    train: Split,
    test: Split | None,
    batches: Batches,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> Preview:
    """Look at the data of a run.

    Args:
        train: the training rows, with `on_bad_row: skip`.
        test: the held-out rows.
        batches: the batches of the run, over the examples of `train`.
        tokenizer: the checkpoint's tokenizer.
        count: rows to show.
    """
    report = train.report
    summary = [f"training data: {report}"]
    if test is not None:
        summary.append(f"held-out data: {test.report}")
    return Preview(
        rows=_first_rows(train.examples, batches, tokenizer, count),
        histogram=length_histogram(train.examples),
        padding=_padding(batches),
        cut=report.cut / max(report.examples, 1),
        learned=report.target_tokens / max(report.tokens, 1),
        longest=_longest(train.examples),
        oddest=_oddest(train.examples),
        skipped=[
            *_skipped(train, ""),
            *_left_out(train, test),
            *([] if test is None else _skipped(test, " (held-out)")),
        ],
        summary=summary,
    )


def pieces_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The tokens of an example, each with the text that it adds."""
    special = ChatTemplate(tokenizer).special_ids
    found, before = [], ""
    ids = example.tokens.tolist()
    for i, (token, learned) in enumerate(zip(ids, example.targets.tolist(), strict=True)):
        # Decoded after its predecessor, since a token alone loses its leading space.
        both = tokenizer.decode(ids[max(i - 1, 0) : i + 1])
        text, alone = str(both)[len(before) :] if i else str(both), str(tokenizer.decode([token]))
        if "\ufffd" in text or not text:  # a part of a character, or after one
            parts = "\ufffd" in alone or not alone
            text = str(tokenizer.convert_ids_to_tokens(token)) if parts else alone
        found.append(Piece(token, printable(text), learned, token in special))
        before = alone
    return found


def _first_rows(
    examples: CachedExamples, batches: Batches, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[RowView]:
    views: list[RowView] = []
    lengths = [length for length, _ in batches.step_lengths()]
    rows_per_step = batches.batch_size * batches.accumulation
    strategy = batches.packing_strategy if batches.packing else "bfd"
    for number, parts in enumerate(batches.rows(0)[:count]):
        row = fill(batches.examples, parts, strategy)
        tokens = np.concatenate([segment.tokens for segment in row])
        targets = np.concatenate([segment.targets for segment in row])
        # `wrapped` makes one segment of several examples; each is shown with its place.
        ends = np.cumsum([stop - start for _, start, stop in parts])
        own = zip(parts, np.split(tokens, ends[:-1]), np.split(targets, ends[:-1]), strict=True)
        segments = [
            SegmentView(examples.where(index), pieces_of(Example(ids, learned), tokenizer))
            for (index, _, _), ids, learned in own
        ]
        views.append(RowView(segments, lengths[number // rows_per_step] - len(tokens)))
    return views


def _padding(batches: Batches) -> float:
    rows = len(batches.rows(0))
    count = batches.batch_size * batches.accumulation
    positions = tokens = 0
    for number, (length, filled) in enumerate(batches.step_lengths()):
        # The empty rows that fill up the last step do not count.
        positions += length * min(count, rows - number * count)
        tokens += filled
    return 1 - tokens / positions


def length_histogram(examples: CachedExamples) -> list[tuple[int, int, int]]:
    """Number of rows from one length to the next, in tokens before truncation."""
    lengths = examples.source.lengths[np.unique(examples.rows)]
    longest = int(lengths.max())
    step = max(-(-longest // BINS), 1)
    edges = np.arange(0, longest + step + 1, step)
    counts, _ = np.histogram(lengths, edges)
    return [
        (int(low), int(high), int(count))
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if low <= longest
    ]


def _longest(examples: CachedExamples) -> list[tuple[str, str]]:
    rows = np.unique(examples.rows)
    lengths = examples.source.lengths[rows]
    order = np.argsort(-lengths, kind="stable")[:LISTED]
    return [(examples.source.where(int(rows[i])), f"{lengths[i]:,} tokens") for i in order]


def _oddest(examples: CachedExamples) -> list[tuple[str, str]]:
    """Rows of which the least is learned: a long prompt with a short answer, or a broken one."""
    counts, lengths = examples.target_counts, examples.lengths
    order = np.argsort(counts / lengths, kind="stable")[:LISTED]
    return [
        (examples.where(int(i)), f"{counts[i]:,} of {lengths[i]:,} tokens are learned")
        for i in order
    ]


def _skipped(split: Split, of: str) -> list[Skipped]:
    """Bad rows, by kind."""
    first: dict[Kind, list[tuple[str, str]]] = {kind: [] for kind in split.report.bad}
    for row in split.bad_rows.tolist():
        kind, problem = split.examples.source.problem(row)
        if len(first[kind]) < LEFT_OUT:
            first[kind].append((split.examples.source.where(row), problem))
    counts = split.report.bad.most_common()
    return [Skipped(kind + of, count, first[kind]) for kind, count in counts]


def _left_out(train: Split, test: Split | None) -> list[Skipped]:
    """Good rows without an example."""
    source = train.examples.source
    left = ~source.bad
    left[train.examples.rows] = False
    held = np.zeros_like(left) if test is None else left & source.repeats(test.contents())
    found = []
    for kind, chosen in (
        ("also held out", held),
        ("with nothing to learn within max_length", left & ~held),
    ):
        rows = np.flatnonzero(chosen)
        first = [
            (source.where(row), f"{source.lengths[row]:,} tokens")
            for row in rows[:LEFT_OUT].tolist()
        ]
        if len(rows):
            found.append(Skipped(kind, len(rows), first))
    return found


def runs(pieces: Sequence[Piece]) -> list[tuple[bool, list[Piece]]]:
    """Neighboring tokens that are learned, or are not, together."""
    found: list[tuple[bool, list[Piece]]] = []
    for piece in pieces:
        if not found or found[-1][0] != piece.learned:
            found.append((piece.learned, []))
        found[-1][1].append(piece)
    return found
