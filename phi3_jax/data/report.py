"""What happened to the rows of a split, in a line for the start of a run."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from phi3_jax.data.rows import Kind


@dataclasses.dataclass
class DataReport:
    """Statistics on how the rows of one split were processed.

    Attributes:
        rows: rows read.
        examples: rows that became examples.
        cut: examples that were longer than `max_length`.
        dropped: rows with nothing left to learn after truncation.
        bad: rows left out (`on_bad_row: skip`), by kind.
        first_bad: where the first row of each kind is.
        tokens, target_tokens: totals over all examples.
        renamed: columns recognized by another name, ours to theirs, with the number of rows.
        unused: columns, and keys of messages, that change no example, with the number of rows.
    """

    rows: int = 0
    examples: int = 0
    cut: int = 0
    dropped: int = 0
    bad: collections.Counter[Kind] = dataclasses.field(default_factory=collections.Counter)
    first_bad: dict[Kind, str] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    target_tokens: int = 0
    renamed: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    unused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def skipped(self) -> int:
        """Rows left out for all reasons together."""
        return self.bad.total()

    def skip(self, kind: Kind, where: str) -> None:
        """Count a bad row."""
        self.bad[kind] += 1
        self.first_bad.setdefault(kind, where)

    def note(self, renamed: Mapping[str, str], unused: Iterable[str]) -> None:
        """Count what a good row was read as, and what of it was not used."""
        self.renamed.update(renamed.items())
        self.unused.update(unused)

    def __str__(self) -> str:
        parts = [
            f"{self.examples:,} examples of {self.rows:,} rows",
            f"{self.tokens:,} tokens, {self.target_tokens:,} of them learned",
        ]
        if self.cut:
            parts.append(f"{self.cut:,} cut to max_length")
        if self.dropped:
            parts.append(f"{self.dropped:,} dropped: nothing to learn within max_length")
        if self.bad:
            kinds = [
                f"{count:,} {kind} (first: {self.first_bad[kind]})"
                for kind, count in self.bad.most_common()
            ]
            parts.append(f"{self.skipped:,} skipped: {', '.join(kinds)}")
        if self.renamed:
            pairs = sorted(f"{theirs} as {ours}" for ours, theirs in self.renamed)
            parts.append(f"columns read: {', '.join(pairs)}")
        if self.unused:
            parts.append(f"not used: {', '.join(sorted(self.unused))}")
        return "; ".join(parts)
