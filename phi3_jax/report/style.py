"""The frame of a page: head, style for light and dark, and the parts that pages are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from phi3_jax.report.text import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #59636e; --page: #f6f7f9;
  --card: #fff; --line: #d5dae1; --warn: #fff4d6; --warn-line: #d9a400; --bar: #9ecbff;
  --c0: #0969da; --c1: #cf5a00; --c2: #1a7f37; --c3: #a0408f; --c4: #0f9fb5; --c5: #9a6700;
  --c6: #57606a; --c7: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --page: #0d1117;
  --card: #161b22; --line: #363d47; --warn: #332701; --warn-line: #b58900; --bar: #1f4f82;
  --c0: #58a6ff; --c1: #f0883e; --c2: #56d364; --c3: #db8bd0; --c4: #4fd1e0; --c5: #e3b341;
  --c6: #b1bac4; --c7: #ff7b72; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 84rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; } h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .7rem;
  margin: 1rem 0; }
.tiles div, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr));
  gap: .7rem; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .95rem; }
figure svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif; }
.warnings { background: var(--warn); border: 1px solid var(--warn-line); border-radius: 8px;
  padding: .5rem .8rem .5rem 1.8rem; margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .3rem .8rem; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; font-size: .85rem; color: var(--soft); }
td, th { padding: .3rem 1rem .3rem 0; vertical-align: top; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: .7rem; align-items: start; margin-top: .7rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr));
  gap: .7rem; margin-top: .4rem; }
.answers > div { border-left: 3px solid var(--line); padding-left: .6rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.answers b, .prompt b { display: block; color: var(--soft); font-size: .8rem; font-weight: 600; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; }
.cards { display: grid; gap: .7rem; }
.fill { background: var(--bar); height: .9rem; min-width: 1px; border-radius: 2px; }
td.w { width: 45%; min-width: 5rem; }
pre { font: 13px/1.5 ui-monospace, monospace; overflow-x: auto; margin: .3rem 0; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .5rem .8rem; } summary { cursor: pointer; }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%;
  margin-right: .4rem; }
.legend span { display: inline-block; } .legend > span { margin-right: 1.2rem; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole page; the pieces of the body are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True, raw: int = 0
) -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
        head: the names of the columns; empty leaves them out.
        rows: the cells, escaped here.
        numbers: align all columns but the first to the right.
        raw: how many of the last columns are HTML.
    """
    columns = ["", *(' class="n"' if numbers else "" for _ in range(1000))]
    lines = []
    if head:
        pairs = zip(head, columns, strict=False)
        lines.append("".join(f"<th{kind}>{escape(cell)}</th>" for cell, kind in pairs))
    for row in rows:
        own = len(row) - raw
        cells = [f"<td{columns[i]}>{escape(cell)}</td>" for i, cell in enumerate(row[:own])]
        lines.append("".join([*cells, *(f"<td class='w'>{cell}</td>" for cell in row[own:])]))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{body}</table></div>'


def bar(share: float) -> str:
    """A bar of this share of its cell's width."""
    if not share > 0:
        return ""
    return f'<div class="fill" style="width:{100 * min(share, 1):.1f}%"></div>'


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """Large numbers, each with what it is."""
    cells = "".join(f"<div><b>{escape(b)}</b><span>{escape(a)}</span></div>" for a, b in items)
    return f'<div class="tiles">{cells}</div>'


def dot(color: int) -> str:
    """The mark of a run in a legend."""
    return f'<span class="dot" style="background:var(--c{color})"></span>'
