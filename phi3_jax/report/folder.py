"""Read what a run left in its output folder, for a report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from phi3_jax.errors import UserError
from phi3_jax.report.shapes import (
    RECORD_SHAPE,
    SAMPLE_SHAPE,
    SCORES_SHAPE,
    SWEEP_SHAPE,
    fitting,
    is_number,
)

RECORD = "run.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
Points = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run, as its files tell it; what is missing or damaged is empty.

    Attributes:
        path: the output folder.
        name: what the report calls it.
        series: the finite values of each metric, with their steps, in order.
        evaluations: held-out metrics by step; a value that was not finite is nan.
        record: run.json (see `phi3_jax.training.record`); a sweep's members share the sweep's.
        config: config.yaml as a mapping.
        config_text: config.yaml.
        samples: the sample prompts with the answers `before` and `after`.
        scores: evaluation.json of `phi3-jax evaluate`: the metrics of each model.
        damaged: names of checkpoints that were put aside as damaged.
    """

    path: Path
    name: str
    series: dict[str, Points]
    evaluations: dict[int, dict[str, float]]
    record: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    samples: list[dict[str, str]]
    scores: dict[str, dict[str, float]]
    damaged: list[str]

    def last(self, metric: str) -> float | None:
        """The last finite value of a metric."""
        points = self.series.get(metric)
        return points[-1][1] if points else None

    @property
    def result_step(self) -> int | None:
        """The step of the evaluation that counts: the exported one's, or the last one so far."""
        exported: int | None = self.record.get("exported_step")
        return exported if exported in self.evaluations else max(self.evaluations, default=None)

    def setting(self, key: str) -> Any:
        """A setting by its dotted name, such as `training.learning_rate`."""
        section, _, name = key.partition(".")
        return (self.config.get(section) or {}).get(name)

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The starts of the run."""
        return list(self.record.get("attempts", []))

    @property
    def seconds(self) -> dict[str, float]:
        """Time by phase, of all attempts together."""
        total: defaultdict[str, float] = defaultdict(float)
        for attempt in self.attempts:
            for phase, seconds in attempt.get("seconds", {}).items():
                total[phase] += seconds
        return dict(total)


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs in these folders; a sweep's folder stands for its members.

    Raises:
        UserError: a folder holds no run.
    """
    runs: list[RunFolder] = []
    for folder in folders:
        members = member_folders(folder)
        if (folder / METRICS).is_file():
            runs.append(read_run(folder))
        elif members:
            record = fitting(_json(folder / RECORD), RECORD_SHAPE)
            runs += [read_run(member, record) for member in members]
        else:
            raise UserError(f"{folder}: no {METRICS} here: is this the output_dir of a run?")
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else dataclasses.replace(run, name=str(run.path))
        for run in runs
    ]


def member_folders(folder: Path) -> list[Path]:
    """The folders of a sweep's members, the best first once the sweep has finished."""
    found = sorted(file.parent for file in folder.glob(f"*/{METRICS}"))
    ranked = fitting(_json(folder / "sweep.json"), SWEEP_SHAPE).get("members", [])
    order = {member.get("name"): place for place, member in enumerate(ranked)}
    return sorted(found, key=lambda path: order.get(path.name, len(order)))


def read_run(folder: Path, record: dict[str, Any] | None = None) -> RunFolder:
    """Read a run's folder; `record` replaces its run.json, for a member of a sweep."""
    series: defaultdict[str, Points] = defaultdict(list)
    evaluations: dict[int, dict[str, float]] = {}
    for line in _json_lines(folder / METRICS):
        step = line.pop("step", None)
        if not is_number(step) or not isinstance(step, int):
            continue
        values = {
            name: math.nan if value is None else float(value)
            for name, value in line.items()
            if value is None or is_number(value)
        }
        for name, value in values.items():
            if math.isfinite(value):
                series[name].append((step, value))
        if "eval_loss" in values:
            evaluations[step] = values
    text = _text(folder / "config.yaml")
    return RunFolder(
        path=folder,
        name=folder.resolve().name,
        series=dict(series),
        evaluations=evaluations,
        record=fitting(_json(folder / RECORD), RECORD_SHAPE) if record is None else record,
        config=_yaml(text),
        config_text=text,
        samples=[fitting(sample, SAMPLE_SHAPE) for sample in _json_lines(folder / SAMPLES)],
        scores=fitting(_json(folder / "evaluation.json"), SCORES_SHAPE),
        damaged=sorted(path.name for path in (folder / "checkpoints").glob("*.damaged")),
    )


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a FIFO would never end
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _yaml(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    sections = found.items() if isinstance(found, dict) else ()
    return {name: section for name, section in sections if isinstance(section, dict)}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    # Not `splitlines`, which would also cut at characters that JSON strings may hold.
    for line in _text(path).split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # such as one that was being written when the run was killed
        if isinstance(record, dict):
            found.append(record)
    return found
