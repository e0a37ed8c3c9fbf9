"""A preview for the terminal; without color, what is learned stands between « and »."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from phi3_jax.data.dataset import Split
from phi3_jax.data.preview import LISTED, Preview, RowView, SegmentView, pieces_of, runs

LEARNED, PROMPT, SPECIAL = "bold green", "default", "reverse"
WIDTH = 40  # of the longest bar
SHOWN = 256  # tokens of the first row


def print_preview(preview: Preview, console: Console) -> None:
    """Print the whole preview."""
    for line in preview.summary:
        console.print(line, markup=False, soft_wrap=True)
    for number, row in enumerate(preview.rows, start=1):
        _print_row(number, row, console)
    console.print(f"\npadding {preview.padding:.1%} of all positions", markup=False)
    console.print(f"cut to max_length: {preview.cut:.1%} of the examples", markup=False)
    console.print(f"learned: {preview.learned:.1%} of the tokens", markup=False)
    console.print("\nlengths of the rows, in tokens:", markup=False)
    most = max(count for _, _, count in preview.histogram)
    for low, high, count in preview.histogram:
        bar = "#" * -(-count * WIDTH // most)
        console.print(f"{low:>8,} to {high - 1:>7,} {count:>9,} {bar}", markup=False)
    _print_list("the longest rows", preview.longest, console)
    _print_list("the rows of which the least is learned", preview.oddest, console)
    for skipped in preview.skipped:
        title = f"skipped: {skipped.count:,} {skipped.kind}"
        _print_list(title, skipped.first[:LISTED], console)
        if (more := skipped.count - LISTED) > 0:
            console.print(f"  and {more:,} more; --html lists them", markup=False)


def first_row(split: Split, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first example as a line for the start of a run, with what is learned between « and »."""
    pieces = pieces_of(split.examples[0], tokenizer)
    shown = pieces[:SHOWN]
    text = segment_text(SegmentView(split.examples.where(0), shown), color=False).plain
    more = f" ... {len(pieces) - SHOWN:,} more tokens" if len(pieces) > SHOWN else ""
    return f"first row ({split.examples.where(0)}), learned between « and »: {text}{more}"


def segment_text(segment: SegmentView, color: bool) -> Text:
    """An example's tokens, with what is learned and the special tokens visible."""
    text = Text()
    for learned, pieces in runs(segment.pieces):
        if learned and not color:
            text.append("«")
        for piece in pieces:
            style = f"{LEARNED if learned else PROMPT}{f' {SPECIAL}' if piece.special else ''}"
            text.append(piece.text, style=style if color else "")
        if learned and not color:
            text.append("»")
    return text


def _print_row(number: int, row: RowView, console: Console) -> None:
    color = console.is_terminal and not console.no_color
    tokens = sum(len(segment.pieces) for segment in row.segments)
    learned = sum(segment.learned for segment in row.segments)
    padding = f", {row.padding:,} padding" if row.padding else ""
    title = f"row {number}: {tokens:,} tokens, {learned:,} learned{padding}"
    console.print(f"\n--- {title}", markup=False)
    for index, segment in enumerate(row.segments, start=1):
        part = f"segment {index} of {len(row.segments)}, " if len(row.segments) > 1 else ""
        console.print(f"[{part}{segment.where}]", markup=False, soft_wrap=True)
        console.print(segment_text(segment, color), soft_wrap=True)


def _print_list(title: str, items: Sequence[tuple[str, str]], console: Console) -> None:
    console.print(f"\n{title}:", markup=False)
    for where, what in items:
        console.print(f"  {where}: {what}", markup=False, soft_wrap=True)
