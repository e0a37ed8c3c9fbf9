"""A preview as one HTML file, which needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from phi3_jax.data.preview import Piece, Preview, RowView

STYLE = """
:root { color-scheme: light dark; --learned: #b7e4c7; --line: #8884; --special: #6c757d; }
@media (prefers-color-scheme: dark) { :root { --learned: #1b5e3a; --special: #adb5bd; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.tokens { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; word-break: break-word;
  border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .3rem 0 .8rem; }
.t { border-right: 1px solid var(--line); }
.l { background: var(--learned); }
.s { color: var(--special); outline: 1px solid var(--special); border-radius: 3px;
  margin: 0 1px; }
.where { color: var(--special); font-size: .85rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left;
  vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: var(--learned); height: 1rem; min-width: 1px; }
.legend span { padding: .1rem .4rem; }
"""


def to_html(preview: Preview, title: str) -> str:
    """The page."""
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in preview.summary),
        '<p class="legend"><span class="l">learned</span> <span>not learned</span> '
        '<span class="s">special token</span> Hover over a token for its id and position.</p>',
        "<h2>Rows</h2>",
        *(_row(number, row) for number, row in enumerate(preview.rows, start=1)),
        "<h2>Shares</h2>",
        _table(
            [
                ("padding", f"{preview.padding:.1%} of all positions"),
                ("cut to max_length", f"{preview.cut:.1%} of the examples"),
                ("learned", f"{preview.learned:.1%} of the tokens"),
            ]
        ),
        "<h2>Lengths of the rows, in tokens</h2>",
        _histogram(preview),
        "<h2>The longest rows</h2>",
        _table(preview.longest),
        "<h2>The rows of which the least is learned</h2>",
        _table(preview.oddest),
    ]
    for skipped in preview.skipped:
        body += [
            f"<h2>Skipped: {skipped.count:,} {escape(skipped.kind)}</h2>",
            _table(skipped.first),
        ]
        if (more := skipped.count - len(skipped.first)) > 0:
            body.append(f"<p>and {more:,} more</p>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _row(number: int, row: RowView) -> str:
    tokens = sum(len(segment.pieces) for segment in row.segments)
    learned = sum(segment.learned for segment in row.segments)
    padding = f", {row.padding:,} padding" if row.padding else ""
    parts = [f"<h3>Row {number}: {tokens:,} tokens, {learned:,} learned{padding}</h3>"]
    for index, segment in enumerate(row.segments, start=1):
        part = f"segment {index} of {len(row.segments)}, " if len(row.segments) > 1 else ""
        spans = "".join(_token(place, piece) for place, piece in enumerate(segment.pieces))
        parts.append(f'<div class="where">{part}{escape(segment.where)}</div>')
        parts.append(f'<div class="tokens">{spans}</div>')
    return "\n".join(parts)


def _token(place: int, piece: Piece) -> str:
    classes = "t" + " l" * piece.learned + " s" * piece.special
    text = escape(piece.text.encode("utf-8", "backslashreplace").decode("utf-8"))
    # A line break is shown as such and as a sign.
    text = text.replace("\n", "\u21b5\n")
    return f'<span class="{classes}" title="id {piece.id}, position {place}">{text}</span>'


def _histogram(preview: Preview) -> str:
    most = max(count for _, _, count in preview.histogram)
    rows = "".join(
        f'<tr><td class="n">{low:,} to {high - 1:,}</td><td class="n">{count:,}</td>'
        f'<td style="width:24rem"><div class="bar" style="width:{100 * count / most:.1f}%"></div>'
        "</td></tr>"
        for low, high, count in preview.histogram
    )
    return f"<table>{rows}</table>"


def _table(items: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in items)
    return f"<table>{rows}</table>"
