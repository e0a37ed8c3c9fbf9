"""The charts of one run or of several."""

from __future__ import annotations

from collections.abc import Sequence

from phi3_jax.report.curves import COLORS, Chart, Series, to_svg
from phi3_jax.report.folder import RunFolder
from phi3_jax.report.text import escape, fixed, three_digits

_PERCENT = ("utilization", "mean_token_accuracy", "eval_mean_token_accuracy")
# Title and metric of the charts after the loss.
_CHARTS = (
    ("Learning rate", "learning_rate"),
    ("Gradient norm, before clipping", "grad_norm"),
    ("Tokens per second, without padding", "tokens_per_second"),
    ("Utilization, share of the devices' peak", "utilization"),
    ("Model TFLOP/s", "tflops_per_second"),
)


def of_run(run: RunFolder) -> list[Chart]:
    """The charts of a run that has been written about at all."""
    loss = [
        Series("training", run.series.get("loss", []), 0),
        Series("held out", run.series.get("eval_loss", []), 1, marked=True),
    ]
    charts = [Chart("Loss", loss)]
    for title, metric in _CHARTS:
        series = [Series("", run.series.get(metric, []), 0)]
        charts.append(Chart(title, series, metric in _PERCENT))
    return _useful(charts)


def of_runs(runs: Sequence[RunFolder]) -> list[Chart]:
    """The same metrics, with a line for each run; the page says which color is whose."""
    charts = []
    for title, metric in (("Training loss", "loss"), ("Held-out loss", "eval_loss"), *_CHARTS):
        series = [
            Series("", run.series.get(metric, []), number, marked=metric == "eval_loss")
            for number, run in enumerate(runs)
        ]
        charts.append(Chart(title, series, metric in _PERCENT))
    return _useful(charts)


def _useful(charts: Sequence[Chart]) -> list[Chart]:
    """Those with points; TFLOP/s only where there is no utilization to show."""
    found = [chart for chart in charts if any(series.points for series in chart.series)]
    titles = [chart.title for chart in found]
    if any(title.startswith("Utilization") for title in titles):
        found = [chart for chart in found if chart.title != "Model TFLOP/s"]
    return found


def figures(charts: Sequence[Chart]) -> str:
    """The charts side by side; tables of first and last values where matplotlib is missing."""
    parts = []
    for chart in charts:
        said = "; ".join(_said(series, chart.percent) for series in chart.series if series.points)
        try:
            svg = to_svg(chart)
        except ImportError:
            svg = "<p>No curve: matplotlib is not installed (<code>pip install matplotlib</code>)."
        label = escape(f"{chart.title}: {said}")
        drawing = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        caption = f'<p class="soft">{escape(said)}</p>' if len(chart.series) <= 2 else ""
        parts.append(
            f'<figure class="card"><figcaption>{escape(chart.title)}</figcaption>'
            f"{drawing}{caption}</figure>"
        )
    return f'<div class="charts">{"".join(parts)}</div>'


def _said(series: Series, percent: bool) -> str:
    values = [value for _, value in series.points]
    name = f"{series.label} " if series.label else ""
    if len(values) == 1:
        return name + _number(values[0], percent)
    first, last = _number(values[0], percent), _number(values[-1], percent)
    return f"{name}{first} to {last}"


def _number(value: float, percent: bool) -> str:
    if percent:
        return f"{value:.1%}"
    return three_digits(value) if value >= 100 or not value else fixed(value, 3)


def color_of(number: int) -> int:
    """The color of the run with this number."""
    return number % COLORS
