"""What happened to the rows of a split, in a line for the start of a run."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from phi3_jax.data.rows import Kind
from phi3_jax.data.token_rows import TokenRows


@dataclasses.dataclass
class DataReport:
    """Statistics on how the rows of one split were processed.

    Attributes:
        rows: rows read.
        examples: rows that became examples, or the pieces that they were split into.
        cut: examples that were truncated to `max_length`; none with `packing_strategy: wrapped`.
        split: rows that were split into pieces of `max_length` (`packing_strategy: bfd_split`).
        dropped: rows with nothing left to learn after truncation.
        bad: rows left out (`on_bad_row: skip`), by kind.
        first_bad: where the first row of each kind is.
        held_out: rows left out because a held-out row has the same tokens.
        repeated: rows that are trained on although a held-out row has the same tokens.
        tokens, target_tokens: totals over all examples.
        sources: of each source of a mixture, its examples and how many of them an epoch takes.
        renamed: columns recognized by another name, ours to theirs, with the number of rows.
        unused: columns, and keys of messages, that change no example, with the number of rows.
        named: columns that the config names, with the number of rows that have them.
        streamed: whether these are only the first rows of a stream.
    """

    rows: int = 0
    examples: int = 0
    cut: int = 0
    split: int = 0
    dropped: int = 0
    bad: collections.Counter[Kind] = dataclasses.field(default_factory=collections.Counter)
    first_bad: dict[Kind, str] = dataclasses.field(default_factory=dict)
    held_out: int = 0
    repeated: int = 0
    tokens: int = 0
    target_tokens: int = 0
    sources: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    renamed: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    unused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    named: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    streamed: bool = False

    @property
    def skipped(self) -> int:
        """Rows left out for all reasons together."""
        return self.bad.total()

    def skip(self, kind: Kind, where: str) -> None:
        """Count a bad row."""
        self.bad[kind] += 1
        self.first_bad.setdefault(kind, where)

    def note(self, source: TokenRows, rows: np.ndarray) -> None:
        """Count what good rows were read as, and what of them was not used."""
        own, notes = source.notes
        for note, count in zip(notes, np.bincount(own[rows], minlength=len(notes)), strict=True):
            for pair in note.renamed.items() if count else ():
                self.renamed[pair] += int(count)
            for name in note.unused if count else ():
                self.unused[name] += int(count)
            for name, found in note.named.items() if count else ():
                self.named[name] += int(count) * found

    def __str__(self) -> str:
        parts = [
            f"{self.examples:,} examples of {self.rows:,} rows",
            f"{self.tokens:,} tokens, {self.target_tokens:,} of them learned",
        ]
        if self.streamed:
            parts[0] = f"streamed; of the first rows: {parts[0]}"
        if self.sources:
            shares = [
                f"{taken:,} of {count:,} of {name}" for name, (count, taken) in self.sources.items()
            ]
            parts.append(f"an epoch takes {', '.join(shares)}")
        if self.cut:
            parts.append(f"{self.cut:,} cut to max_length")
        if self.split:
            parts.append(f"{self.split:,} rows split into pieces of max_length")
        if self.dropped:
            parts.append(f"{self.dropped:,} dropped: nothing to learn within max_length")
        if self.bad:
            kinds = [
                f"{count:,} {kind} (first: {self.first_bad[kind]})"
                for kind, count in self.bad.most_common()
            ]
            parts.append(f"{self.skipped:,} skipped: {', '.join(kinds)}")
        if self.held_out:
            parts.append(f"{self.held_out:,} left out: a held-out row has the same tokens")
        if self.repeated:
            said = "have the tokens of a held-out row (data.test_size splits by row)"
            parts.append(f"{self.repeated:,} {said}")
        if self.renamed:
            pairs = sorted(f"{theirs} as {ours}" for ours, theirs in self.renamed)
            parts.append(f"columns read: {', '.join(pairs)}")
        if self.unused:
            names = (name or "a column without a name" for name in sorted(self.unused))
            parts.append(f"not used: {', '.join(names)}")
        if absent := sorted(name for name, count in self.named.items() if not count):
            parts.append(f"named in the config, but in no row: {', '.join(absent)}")
        return "; ".join(parts)
