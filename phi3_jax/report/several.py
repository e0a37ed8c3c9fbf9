"""The report that compares runs, or the members of a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from phi3_jax.report import charts
from phi3_jax.report.folder import RunFolder
from phi3_jax.report.one import cost, subtitle, warnings_of
from phi3_jax.report.style import dot, page, table
from phi3_jax.report.text import clock, escape, fixed, three_digits

# Settings that differ because the runs are several, not because they were set up differently.
_OWN = {"training.output_dir", "training.run_name"}


def comparison_page(runs: Sequence[RunFolder], title: str, price: float | None = None) -> str:
    """The page of several runs, in the given order.

    Args:
        runs: what their folders hold.
        title: the page's title.
        price: dollars per hour; by default what each config says, if anything.
    """
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{len(runs)} runs</p>',
        "<h2>Results</h2>",
        _results(runs, price),
    ]
    if drawn := charts.of_runs(runs):
        sections += ["<h2>Curves</h2>", _legend(runs), charts.figures(drawn)]
    if rows := differences(runs):
        rows = [["", *(run.name for run in runs)], *rows]
        if len(rows) <= len(runs):  # fewer settings than runs
            rows = [list(column) for column in zip(*rows, strict=True)]
        sections += ["<h2>Settings that differ</h2>", table(rows[0], rows[1:], numbers=False)]
    sections += _samples(runs)
    if found := _warnings(runs):
        items = "".join(f"<li>{escape(text)}</li>" for text in found)
        sections += ["<h2>Warnings</h2>", f'<ul class="warnings">{items}</ul>']
    lines = [(run.name, subtitle(run), _commands(run)) for run in runs]
    sections += ["<h2>Runs</h2>", table(["run", "", "command"], lines, numbers=False)]
    return page(title, sections)


def _warnings(runs: Sequence[RunFolder]) -> list[str]:
    """Each warning once, with the runs that have it unless all do."""
    having: dict[str, list[str]] = {}
    for run in runs:
        for text in warnings_of(run):
            having.setdefault(text, []).append(run.name)
    return [
        text if len(names) == len(runs) else f"{', '.join(names)}: {text}"
        for text, names in having.items()
    ]


def _results(runs: Sequence[RunFolder], price: float | None) -> str:
    """The results of each run; the lowest held-out loss is marked."""
    losses = [_held_out(run).get("eval_loss", math.nan) for run in runs]
    finite = [loss for loss in losses if math.isfinite(loss)]
    best = min(finite) if len(finite) > 1 else None
    rows = []
    for run, loss in zip(runs, losses, strict=True):
        accuracy = _held_out(run).get("eval_mean_token_accuracy")
        train = run.last("loss")
        speed = [value for _, value in run.series.get("tokens_per_second", [])]
        money = cost(run, price)
        rows.append(
            [
                run.name + (" (best)" if loss == best else ""),
                "" if math.isnan(loss) else fixed(loss, 4),
                "" if accuracy is None else f"{accuracy:.1%}",
                "" if train is None else fixed(train, 4),
                f"{max((step for step, _ in run.series.get('loss', [])), default=0):,}",
                three_digits(statistics.median(speed)) if speed else "",
                clock(sum(run.seconds.values())) if run.seconds else "",
                "" if money is None else f"${money[0]:,.2f}",
            ]
        )
    head = ["run", "held-out loss", "token accuracy", "training loss", "steps", "tokens/s",
            "wall time", "cost"]  # fmt: skip
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _held_out(run: RunFolder) -> dict[str, float]:
    return {} if run.result_step is None else run.evaluations[run.result_step]


def _legend(runs: Sequence[RunFolder]) -> str:
    names = [
        f"<span>{dot(charts.color_of(number))}{escape(run.name)}</span>"
        for number, run in enumerate(runs)
    ]
    return f'<p class="legend">{" ".join(names)}</p>'


def differences(runs: Sequence[RunFolder]) -> list[list[str]]:
    """The settings that are not the same in all runs, by their dotted names."""
    flat = [
        {
            f"{section}.{key}": value
            for section, values in run.config.items()
            if isinstance(values, dict)
            for key, value in values.items()
        }
        for run in runs
    ]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [[key, *(str(settings.get(key, "")) for settings in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] not in _OWN]


def _samples(runs: Sequence[RunFolder]) -> list[str]:
    """The answers of all runs to each prompt, side by side."""
    prompts = dict.fromkeys(s["prompt"] for run in runs for s in run.samples if "prompt" in s)
    parts = []
    for prompt in prompts:
        cells = []
        for number, run in enumerate(runs):
            for sample in run.samples:
                if sample.get("prompt") == prompt and "after" in sample:
                    head = f"{dot(charts.color_of(number))}{escape(run.name)}"
                    cells.append(f"<div><b>{head}</b>{escape(sample['after'])}</div>")
        shown = f'<div class="prompt"><b>prompt</b>{escape(prompt)}</div>'
        parts.append(f'<div class="card">{shown}<div class="answers">{"".join(cells)}</div></div>')
    if not parts:
        return []
    return ["<h2>Samples, after training</h2>", f'<div class="cards">{"".join(parts)}</div>']


def _commands(run: RunFolder) -> str:
    commands = [attempt["command"] for attempt in run.attempts if attempt.get("command")]
    return "\n".join(dict.fromkeys(commands))
