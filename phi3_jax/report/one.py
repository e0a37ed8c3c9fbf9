"""The report of one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from phi3_jax.report import charts
from phi3_jax.report.folder import RunFolder
from phi3_jax.report.setup import data_section, repeat_section
from phi3_jax.report.style import bar, page, table, tiles
from phi3_jax.report.text import clock, escape, fixed, gib, three_digits

# How the table of evaluations calls what metrics.jsonl has.
_EVALUATED = {
    "eval_loss": "loss",
    "eval_perplexity": "perplexity",
    "eval_mean_token_accuracy": "token accuracy",
}


def run_page(run: RunFolder, price: float | None = None) -> str:
    """The page of a run.

    Args:
        run: what its folder holds.
        price: dollars per hour; by default what its config says, if anything.
    """
    sections = [
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="soft">{escape(subtitle(run))}</p>',
        tiles(_highlights(run, price)),
    ]
    if found := warnings_of(run):
        items = "".join(f"<li>{escape(text)}</li>" for text in found)
        sections += ["<h2>Warnings</h2>", f'<ul class="warnings">{items}</ul>']
    if drawn := charts.of_run(run):
        sections += ["<h2>Curves</h2>", charts.figures(drawn)]
    if run.samples:
        cards = "".join(_sample(sample) for sample in run.samples)
        sections += ["<h2>Samples</h2>", f'<div class="cards">{cards}</div>']
    sections += _evaluation(run)
    sections += _time(run, price)
    sections += data_section(run)
    sections += repeat_section(run)
    return page(f"{run.name}: report", sections)


def subtitle(run: RunFolder) -> str:
    """One line: the base model, how far the run came, and when."""
    parts = []
    if model := run.setting("model.path"):
        parts.append(f"base model {model}")
    if attempts := run.attempts:
        last = attempts[-1]
        step, total = last.get("step", 0), run.record.get("total_steps", 0)
        state = last.get("state", "")
        if state == "running":
            state = "in training when this page was written"
        done = f"{step:,} steps" if state == "finished" else f"step {step:,} of {total:,}: {state}"
        when = str(attempts[0].get("started", ""))
        parts += [done, f"started {when[:16].replace('T', ' ')} UTC"]
        if len(attempts) > 1:
            parts.append(f"{len(attempts)} starts")
    return "; ".join(parts)


def warnings_of(run: RunFolder) -> list[str]:
    """What the run warned of, and what its files show."""
    found: list[str] = []
    for attempt in run.attempts:
        found += [text.removeprefix("warning: ") for text in attempt.get("warnings", [])]
    if skipped := run.last("skipped_steps"):
        found.append(f"{skipped:.0f} steps were skipped: their loss or gradient was not finite")
    for name, split in (run.record.get("data") or {}).items():
        for kind, count in split.get("skipped", {}).items():
            where = split.get("first skipped", {}).get(kind, "")
            found.append(f"{name} data: {count:,} rows left out: {kind} (first: {where})")
        for key in ("cut to max_length", "dropped, nothing to learn"):
            if split.get(key):
                found.append(f"{name} data: {split[key]:,} examples {key}")
        if split.get("columns not used"):
            found.append(f"{name} data: not used: {', '.join(split['columns not used'])}")
    found += [
        f"the checkpoint of step {name.partition('.')[0]} was damaged, and not used"
        for name in run.damaged
    ]
    return list(dict.fromkeys(found))


def _highlights(run: RunFolder, price: float | None) -> list[tuple[str, str]]:
    items: list[tuple[str, str]] = []
    if (result := run.result_step) is not None:
        steps = sorted({min(run.evaluations), result})
        arrow = " → ".join(fixed(run.evaluations[step]["eval_loss"], 3) for step in steps)
        best = "" if result == max(run.evaluations) else f", exported step {result:,}"
        items.append((f"held-out loss{best}", arrow))
    if (loss := run.last("loss")) is not None:
        items.append(("training loss, last line", fixed(loss, 3)))
    for name, metric, form in (
        ("tokens/s, median", "tokens_per_second", three_digits),
        ("model TFLOP/s, median", "tflops_per_second", three_digits),
        ("utilization, median", "utilization", lambda v: f"{v:.1%}"),
    ):
        if points := run.series.get(metric):
            items.append((name, form(statistics.median(value for _, value in points))))
    if seconds := run.seconds:
        total = sum(seconds.values())
        items.append(("wall time", clock(total)))
        items.append(
            ("goodput: time in steps", f"{seconds.get('steps', 0) / max(total, 1e-9):.0%}")
        )
        if (money := cost(run, price)) is not None:
            items.append((f"estimated cost, at ${money[1]:g} an hour", f"${money[0]:,.2f}"))
    model = run.record.get("model") or {}
    if model.get("trainable") and model.get("parameters"):
        share = model["trainable"] / model["parameters"]
        items.append((f"trainable parameters, {share:.2%}", f"{model['trainable']:,}"))
    return items


def cost(run: RunFolder, price: float | None) -> tuple[float, float] | None:
    """Dollars that the wall time of all attempts costs, and the price of an hour, if known."""
    price = run.setting("training.price_per_hour") if price is None else price
    if not isinstance(price, int | float):
        return None
    return sum(run.seconds.values()) / 3600 * price, price


def _sample(sample: Mapping[str, str]) -> str:
    cells = "".join(
        f"<div><b>{when} training</b>{escape(sample[when])}</div>"
        for when in ("before", "after")
        if when in sample
    )
    return (
        f'<div class="card"><div class="prompt"><b>prompt</b>{escape(sample.get("prompt", ""))}'
        f'</div><div class="answers">{cells}</div></div>'
    )


def _evaluation(run: RunFolder) -> list[str]:
    parts = []
    if run.evaluations:
        names = [name for name in _EVALUATED if any(name in e for e in run.evaluations.values())]
        rows = [
            [f"{step:,}", *(_value(name, values.get(name)) for name in names)]
            for step, values in sorted(run.evaluations.items())
        ]
        parts.append(table(["held-out, after step", *(_EVALUATED[n] for n in names)], rows))
    if run.scores:
        models = list(run.scores)
        metrics = list(dict.fromkeys(name for scores in run.scores.values() for name in scores))
        rows = [
            [metric, *(_value(metric, run.scores[model].get(metric)) for model in models)]
            for metric in metrics
        ]
        parts += ["<h3>From <code>phi3-jax evaluate</code></h3>", table(["metric", *models], rows)]
    return ["<h2>Evaluation</h2>", *parts] if parts else []


def _value(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:.1%}" if name.endswith("accuracy") else fixed(value, 4)


def _time(run: RunFolder, price: float | None) -> list[str]:
    """Wall time and memory by phase, of all attempts together."""
    seconds = run.seconds
    if not seconds:
        return []
    total = sum(seconds.values())
    memory: dict[str, dict[str, int]] = {}
    for attempt in run.attempts:
        for phase, used in attempt.get("memory", {}).items():
            known = memory.setdefault(phase, {})
            known.update({kind: max(size, known.get(kind, 0)) for kind, size in used.items()})
    kinds = [k for k in ("host", "device") if any(k in used for used in memory.values())]
    rows = [
        [
            phase,
            clock(spent),
            f"{spent / max(total, 1e-9):.1%}",
            *(gib(memory[phase][k]) if k in memory.get(phase, {}) else "" for k in kinds),
            bar(spent / max(total, 1e-9)),
        ]
        for phase, spent in sorted(seconds.items(), key=lambda item: -item[1])
        if spent >= 0.05
    ]
    rows.append(["all", clock(total), "100%", *("" for _ in kinds), ""])
    head = ["phase", "time", "share", *(f"{kind} memory" for kind in kinds), ""]
    notes = ["Compiling is not part of the other phases."]
    if kinds:
        notes.append("Memory is the peak so far at the end of the phase.")
    if (money := cost(run, price)) is not None:
        notes.append(f"Estimated cost: {clock(total)} at ${money[1]:g} an hour: ${money[0]:,.2f}.")
    return [
        "<h2>Time and memory</h2>",
        table(head, rows, raw=1),
        f'<p class="soft">{escape(" ".join(notes))}</p>',
    ]
