"""What the JSON files of a run's folder hold; anything else in them is left out.

A report is made of files that people edit, merge, and copy halfway, and a resumed run reads what
was written before it. Neither fails for a value that is not what the program wrote.
"""

from __future__ import annotations

import math
from typing import Any

# A shape is `str`, `int` or `float` (which integers are, too), a one-item list of the shape of all
# items, a tuple of the shapes of each, or a dictionary. Its key `ANY` stands for all others.
Shape = Any
ANY = "*"

_ATTEMPT: dict[str, Shape] = {
    "command": str,
    "started": str,
    "ended": str,
    "state": str,
    "first_step": int,
    "step": int,
    "seconds": {ANY: float},
    "memory": {ANY: {ANY: int}},
    "warnings": [str],
    "versions": {ANY: str},
    "hardware": {
        "devices": int,
        "device": str,
        "platform": str,
        "device_memory": int,
        "processes": int,
        "cpu": str,
        "cores": int,
        "memory": int,
    },
}
_SPLIT: dict[str, Shape] = {
    "skipped": {ANY: int},
    "first skipped": {ANY: str},
    "columns read": [str],
    "columns not used": [str],
    "sources": {ANY: (int, int)},
    "histogram": [(int, int, int)],
    ANY: int,
}
RECORD_SHAPE: Shape = {
    "attempts": [_ATTEMPT],
    "total_steps": int,
    "exported_step": int,
    "model": {"name": str, "folder": str, "parameters": int, "trainable": int},
    "data": {ANY: _SPLIT},
}
SAMPLE_SHAPE: Shape = {ANY: str}
SCORES_SHAPE: Shape = {ANY: {ANY: float}}
SWEEP_SHAPE: Shape = {"members": [{"name": str}]}

_MISSING = object()


def fitting(value: Any, shape: dict[str, Shape]) -> dict[str, Any]:
    """The entries of a JSON object that have this shape; without an object, none."""
    return _fitting(value, shape) if isinstance(value, dict) else {}


def _fitting(value: Any, shape: Shape) -> Any:
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _MISSING
        found = {key: _fitting(item, shape.get(key, shape.get(ANY))) for key, item in value.items()}
        return {key: item for key, item in found.items() if item is not _MISSING}
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _MISSING
        return [item for item in (_fitting(v, shape[0]) for v in value) if item is not _MISSING]
    if isinstance(shape, tuple):
        if not isinstance(value, list) or len(value) != len(shape):
            return _MISSING
        items = [_fitting(item, inner) for item, inner in zip(value, shape, strict=True)]
        return _MISSING if any(item is _MISSING for item in items) else items
    if shape is float:
        return value if is_number(value) else _MISSING
    if shape is int:
        return value if is_number(value) and isinstance(value, int) else _MISSING
    return value if shape is str and isinstance(value, str) else _MISSING


def is_number(value: object) -> bool:
    """Whether it is a finite number that a report can do arithmetic with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
