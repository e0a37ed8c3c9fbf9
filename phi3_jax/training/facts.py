"""What a run's record says about its model and data, as JSON values."""

from __future__ import annotations

from typing import Any

import lora_flax
from phi3_jax.data.dataset import Split
from phi3_jax.data.preview import length_histogram
from phi3_jax.training.setup import Prepared


def run_facts(prepared: Prepared, table: lora_flax.Report | None) -> dict[str, Any]:
    """The `model` and `data` of run.json.

    Args:
        prepared: the run.
        table: what trains; None for a sweep, whose members differ.
    """
    folder = str(prepared.checkpoint.directory)
    model: dict[str, Any] = {"name": prepared.config.model.path, "folder": folder}
    if table is not None:
        model |= {"parameters": table.total, "trainable": table.trainable}
    data = {"training": _split(prepared.train)}
    if prepared.test is not None:
        data["held-out"] = _split(prepared.test)
    return {"model": model, "data": data}


def _split(split: Split) -> dict[str, Any]:
    report = split.report
    return {
        "rows": report.rows,
        "examples": report.examples,
        "tokens": report.tokens,
        "learned tokens": report.target_tokens,
        "cut to max_length": report.cut,
        "split into pieces": report.split,
        "dropped, nothing to learn": report.dropped,
        "skipped": dict(report.bad),
        "first skipped": dict(report.first_bad),
        "columns read": sorted(f"{theirs} as {ours}" for ours, theirs in report.renamed),
        "columns not used": sorted(report.unused),
        "sources": {name: list(counts) for name, counts in report.sources.items()},
        "longest": int(split.examples.lengths.max()),
        "histogram": length_histogram(split.examples),
    }
