"""The sections about a run's data, and about how to repeat it."""

from __future__ import annotations

from typing import Any

from phi3_jax.report.folder import RunFolder
from phi3_jax.report.style import bar, table
from phi3_jax.report.text import escape, gib

_COUNTS = (
    "rows",
    "examples",
    "tokens",
    "learned tokens",
    "cut to max_length",
    "split into pieces",
    "dropped, nothing to learn",
)


def data_section(run: RunFolder) -> list[str]:
    """What the rows of each split became, and how long they are."""
    data: dict[str, dict[str, Any]] = run.record.get("data") or {}
    if not data:
        return []
    rows = [
        [name, *(f"{split.get(name, 0):,}" for split in data.values())]
        for name in _COUNTS
        if any(split.get(name) for split in data.values())
    ]
    for kind in dict.fromkeys(kind for split in data.values() for kind in split.get("skipped", {})):
        counts = (split.get("skipped", {}).get(kind, 0) for split in data.values())
        rows.append([f"left out: {kind}", *(f"{count:,}" for count in counts)])
    for key in ("columns read", "columns not used"):
        if any(split.get(key) for split in data.values()):
            rows.append([key, *(", ".join(split.get(key, [])) for split in data.values())])
    parts = [table(["", *data], rows)]
    for name, split in data.items():
        if split.get("sources"):
            shares = [
                [source, f"{count:,}", f"{taken:,}"]
                for source, (count, taken) in split["sources"].items()
            ]
            parts.append(table([f"source, {name}", "examples", "in an epoch"], shares))
    histograms = "".join(
        f"<div><h3>Lengths of the {escape(name)} rows, in tokens</h3>{_histogram(split)}</div>"
        for name, split in data.items()
        if split.get("histogram")
    )
    return ["<h2>Data</h2>", *parts, f'<div class="two">{histograms}</div>']


def _histogram(split: dict[str, Any]) -> str:
    bins = split["histogram"]
    most = max((count for _, _, count in bins), default=1) or 1
    rows = [
        [f"{low:,} to {high - 1:,}", f"{count:,}", bar(count / most)] for low, high, count in bins
    ]
    return table(["length", "rows", ""], rows, raw=1)


def repeat_section(run: RunFolder) -> list[str]:
    """Command, config, hardware and versions."""
    parts = ["<h2>To repeat it</h2>"]
    attempts = run.attempts
    commands = [attempt["command"] for attempt in attempts if attempt.get("command")]
    if commands:
        lines = "\n".join(dict.fromkeys(commands))
        parts.append(f'<div class="card"><pre class="wrap">{escape(lines)}</pre></div>')
    tables = []
    if attempts:
        last = attempts[-1]
        rows = _hardware(last.get("hardware", {}), run.config.get("mesh") or {})
        tables.append(table(["hardware", ""], rows, numbers=False))
        versions = sorted(last.get("versions", {}).items())
        tables.append(table(["package", "version"], versions, numbers=False))
    parts.append(f'<div class="two">{"".join(tables)}</div>')
    if run.config_text:
        parts.append(
            "<h3>Config, with every default filled in</h3><details><summary>config.yaml</summary>"
            f"<pre>{escape(run.config_text)}</pre></details>"
        )
    return parts


def _hardware(found: dict[str, Any], mesh: dict[str, Any]) -> list[tuple[str, str]]:
    devices = f"{found.get('devices')} x {found.get('device')} ({found.get('platform')})"
    rows = [
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size)),
        ("devices at hand", devices),
        ("memory of a device", found.get("device_memory") and gib(found["device_memory"])),
        ("processes", found.get("processes")),
        ("CPU", found.get("cpu")),
        ("cores", found.get("cores")),
        ("memory", found.get("memory") and gib(found["memory"])),
    ]
    return [(name, str(value)) for name, value in rows if value and found]
