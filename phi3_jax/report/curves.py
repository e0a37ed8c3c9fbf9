"""Curves over steps: inline SVG that takes its colors from the page, and PNG for a model card."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from phi3_jax.report.folder import Points

# A longer series is drawn as this many means.
MOST_POINTS = 400
COLORS = 8
# Colors in the SVG that stand for the page's own: its text, its lines, and those of the series.
_INK, _LINE = "#010203", "#010204"
_SERIES = [f"#0102{16 + i:02x}" for i in range(COLORS)]
# The PNG has a white background and the palette of Okabe and Ito, made for color-blind readers.
_PNG_SERIES = "#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00 #000000 #999999".split()
_STYLES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        label: what the legend calls it; empty leaves it out.
        points: steps and values.
        color: 0 to 7, and from 8 on the same colors with other dashes.
        marked: draw a marker at each point.
    """

    label: str
    points: Points
    color: int = 0
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over steps.

    Attributes:
        title: what they show, with the unit.
        series: the lines; those without points are left out.
        percent: the values are shares.
    """

    title: str
    series: Sequence[Series]
    percent: bool = False


def to_svg(chart: Chart) -> str:
    """An `<svg>` element without size, colored by `currentColor`, `--line` and `--c0` to `--c7`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        figure = _draw(chart, (3.9, 2.4), _INK, _LINE, _SERIES)
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    # Several charts stand in one page, where an id may occur once.
    prefix = re.sub(r"\W+", "-", chart.title.lower())
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = text.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    for number, color in enumerate(_SERIES):
        text = text.replace(color, f"var(--c{number})")
    return text


def to_png(chart: Chart) -> bytes:
    """A picture on white, 1,200 pixels wide.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _draw(chart, (6.0, 3.4), "#333333", "#cccccc", _PNG_SERIES)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=200, metadata={"Software": None})
    return out.getvalue()


def _draw(
    chart: Chart, size: tuple[float, float], ink: str, line: str, colors: Sequence[str]
) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    small, drawn = 8, [series for series in chart.series if series.points]
    for series in drawn:
        steps, values = zip(*thinned(series.points), strict=True)
        axes.plot(
            steps,
            values,
            color=colors[series.color % COLORS],
            linestyle=_STYLES[series.color // COLORS % len(_STYLES)],
            linewidth=1.6,
            marker="o" if series.marked or len(steps) == 1 else "",
            markersize=3.5,
            label=series.label or "_",
        )
    axes.set_xlabel("step", fontsize=small, color=ink)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick(chart.percent)))
    axes.tick_params(labelsize=small, labelcolor=ink, color=line, length=3)
    axes.grid(color=line, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(line)
    if any(series.label for series in drawn):
        legend = axes.legend(fontsize=small, frameon=False, labelcolor=ink)
        legend.set_in_layout(False)
    return figure


def _tick(percent: bool) -> Callable[[float, int], str]:
    def text(value: float, _: int) -> str:
        if percent:
            return f"{value * 100:.3g}%"
        if value and abs(value) < 1e-3:
            mantissa, exponent = f"{value:.2e}".split("e")
            return f"{float(mantissa):g}e{int(exponent)}"
        return f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"

    return text


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points: means of neighbors, each at the last of their steps."""
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
