"""Compiled programs: FLOPs from the jaxpr and collectives from the HLO.

XLA's `cost_analysis` counts a loop body once and ignores Pallas kernels. Here kernels are counted,
and loop bodies are multiplied by how often they run.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable
from typing import Any

from jax.extend.core import jaxprs_in_params

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
# Layouts also contain parentheses, but after capital letters: `bf16[8,128]{1,0:T(8,128)}`.
_OPERATION = re.compile(r"(?<![\w\-])([a-z][a-z\-]*[a-z])\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\})")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


def matmul_flops(jaxpr: Any, while_trips: int = 1) -> int:
    """FLOPs of all matrix products in a jaxpr, counting a multiply-add as two.

    Args:
        jaxpr: `jax.make_jaxpr(f)(...)`, or an inner jaxpr.
        while_trips: iterations of a `while`, which a jaxpr does not record (a `scan` does).
    """

    def of(equation: Any) -> int | None:
        if equation.primitive.name != "dot_general":
            return None
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        out = math.prod(equation.outvars[0].aval.shape)
        return int(2 * out * math.prod(left[axis] for axis in contracted))

    return _sum(jaxpr, while_trips, of)


def matmul_bytes(jaxpr: Any, while_trips: int = 1) -> int:
    """Bytes of operands and results of all matrix products and kernels; see `matmul_flops`."""

    def of(equation: Any) -> int | None:
        if equation.primitive.name not in ("dot_general", "pallas_call"):
            return None
        avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
        return sum(int(math.prod(aval.shape) * aval.dtype.itemsize) for aval in avals)

    return _sum(jaxpr, while_trips, of)


def _sum(jaxpr: Any, while_trips: int, of: Callable[[Any], int | None]) -> int:
    """Sum `of` over all equations, times loop trip counts; None from `of` means recurse."""
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        own = of(equation)
        if own is not None:
            total += own
            continue
        name, params = equation.primitive.name, equation.params
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "while":
            times = while_trips
        elif name == "shard_map":
            times = params["mesh"].size
        elif name == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
        inner = [_sum(part, while_trips, of) for part in jaxprs_in_params(params)]
        total += times * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def collective_bytes(hlo: str, while_trips: int = 1) -> dict[str, int]:
    """Bytes each chip receives or sends per run, by kind of collective: the larger operand side.

    Args:
        hlo: text of a compiled program, for one chip.
        while_trips: iterations of loops whose trip count is not in the text.
    """
    own: dict[str, dict[str, int]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    limits: dict[str, int] = {}
    rings: dict[str, int] = {}
    loops: list[tuple[str, str, str]] = []
    entry = current = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            current = found[1]
            own[current], calls[current] = collections.Counter(), []
            entry = current if line.startswith("ENTRY") else entry
            continue
        if not current or " = " not in line:
            continue
        if not (operation := _OPERATION.search(line.partition(" = ")[2])):
            continue
        result, rest = operation.string[: operation.start()], operation.string[operation.end() :]
        kind = operation[1].removesuffix("-start")
        if kind in COLLECTIVES:
            if pairs := _PAIRS.search(rest):
                shards = pairs[1].count("{") - 2  # minus its own; one bracket encloses them all
                rings[current] = max(rings.get(current, 0), shards * _bytes(result))
            own[current][kind] += max(_bytes(result), _bytes(rest.split("), ")[0]))
        if kind == "constant" and result.startswith("s32[]") and rest.partition(")")[0].isdigit():
            limits[current] = max(limits.get(current, 0), int(rest.partition(")")[0]))
        if kind != "while":
            calls[current] += [(name, 1) for name in _CALLED.findall(rest)]
        elif known := _TRIPS.search(rest):
            calls[current] += [(name, int(known[1])) for name in _CALLED.findall(rest)]
        else:
            loops += [
                (current, _CONDITION.findall(rest)[0], body) for body in _CALLED.findall(rest)
            ]
    for caller, condition, body in loops:
        if "windowed_dot_general" in body:
            # A matmul that passes one operand around the ring as it computes: each chip receives
            # g - 1 of g shards, however the compiler unrolled the loop.
            own[body] = {"collective-permute": rings.get(body, 0)}
            calls[caller].append((body, 1))
        else:
            # A loop with a fixed trip count has it in its condition; a dynamic one does not.
            calls[caller].append((body, limits.get(condition, while_trips)))
    return _totals(entry, own, calls)


def _bytes(text: str) -> int:
    """Bytes of the largest array in a piece of HLO; for a tuple, its largest member."""
    sizes = [
        _BYTES.get(kind, 4) * math.prod(int(size) for size in dims.split(",") if size)
        for kind, dims in _SHAPE.findall(text)
    ]
    return max(sizes, default=0)


def _totals(
    name: str, own: dict[str, dict[str, int]], calls: dict[str, list[tuple[str, int]]]
) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter(own.get(name, {}))
    for callee, times in calls.get(name, []):
        for kind, size in _totals(callee, own, calls).items():
            total[kind] += times * size
    return dict(total)
