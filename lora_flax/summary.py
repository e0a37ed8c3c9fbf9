"""What is wrapped and how much of the model trains, as data and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flax import nnx

from lora_flax.index import Layer, ModelIndex
from lora_flax.layers.adapter import Adapter
from lora_flax.layers.trained_whole import (
    ReplacedBase,
    SavedModule,
    TokenRows,
    TrainedCopy,
    TrainedHead,
)
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.quant.layer import QuantizedDense
from lora_flax.targets.naming import dotted
from lora_flax.trainable import trainable_filter


@dataclass(frozen=True)
class LayerReport:
    """One wrapped layer.

    Attributes:
        name: includes the slices that have an update, unless it is the whole layer.
        stack: number of layers it holds; 1 if it is not a stack.
        features_in, features_out: dimensions of its weight; 0 for a module that trains in full.
        r: rank, or the lowest and highest as `4-16`.
        parameters: trainable elements over the full stack, excluding padding.
    """

    name: str
    stack: int
    features_in: int
    features_out: int
    r: str
    parameters: int


@dataclass(frozen=True)
class Report:
    """The wrapped layers, and the trainable (including biases) and total parameter counts."""

    layers: tuple[LayerReport, ...]
    trainable: int
    total: int


def report(model: nnx.Module) -> Report:
    """Describes the active adapters of a wrapped model.

    Raises:
        LoraError: if it has no LoRA layers, none is active, or it is merged.
    """
    return report_on(ModelIndex(model))


def report_on(index: ModelIndex) -> Report:
    """`report` for an indexed model."""
    trains = trainable_filter(index)
    trainable = total = 0
    for path, variable in nnx.to_flat_state(nnx.state(index.model, nnx.Param)):
        size = math.prod(variable.get_value().shape)
        total += size
        trainable += size if trains(path, variable) else 0
    rows, padding = [], 0
    for layer in index.layers:
        plain = layer.module.plain if isinstance(layer.module, LoRALayer) else layer.module
        if isinstance(plain, QuantizedDense):
            total += math.prod(layer.stack) * layer.features_in * layer.features_out
        if isinstance(layer.module, LoRALayer):
            for adapter in layer.module.in_use:
                count, size = _count(adapter)
                padding += size - count
                rows.append(_row(layer, adapter, count))
    for path, module in index.saved_modules.items():
        name = module.used_name
        if name is not None and not isinstance(module, ReplacedBase):
            count, size = _count_whole(module, name)
            padding += size - count
            what = "tokens" if isinstance(module.in_use, TokenRows) else "whole"
            place = dotted(index.place(path))
            if isinstance(module, TrainedHead):
                place = module.plain.tied_head
            rows.append(LayerReport(f"{place} ({what})", 1, 0, 0, "", count))
    return Report(tuple(rows), trainable - padding, total - padding)


def format_table(report: Report) -> str:
    """Formats the report as text, one line per layer with the total below."""
    rows = [("layer", "stack", "in", "out", "r", "trainable")]
    rows += [
        (
            layer.name,
            str(layer.stack),
            str(layer.features_in or ""),
            str(layer.features_out or ""),
            layer.r,
            f"{layer.parameters:,}",
        )
        for layer in report.layers
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [name.ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        )
        for name, *cells in rows
    ]
    share = 100 * report.trainable / report.total
    lines.append(f"trainable: {report.trainable:,} of {report.total:,} parameters ({share:.2f} %)")
    return "\n".join(lines)


def _row(layer: Layer, adapter: Adapter, count: int) -> LayerReport:
    spec = adapter.spec
    names = ", ".join(part.name for part in spec.slices if part.name)
    ranks = [rank for row in spec.ranks for rank in row]
    low, high = min(ranks), max(ranks)
    return LayerReport(
        f"{layer.name} ({names})" if names else layer.name,
        math.prod(layer.stack),
        layer.features_in,
        layer.features_out,
        str(high) if low == high else f"{low}-{high}",
        count,
    )


def _count(adapter: Adapter) -> tuple[int, int]:
    """Number of trainable elements, and total number of elements."""
    spec, size = adapter.spec, _size(adapter)
    members = len(spec.ranks)
    per_rank_a = adapter.lora_A[...].size // (members * len(spec.slices) * spec.rank)
    b_rows = adapter.lora_B[...].shape[-2]
    count = size - adapter.lora_A[...].size - adapter.lora_B[...].size
    for row in spec.ranks:
        for rank, part in zip(row, spec.slices, strict=True):
            count += rank * per_rank_a + rank * b_rows // spec.rank * part.size
            if not rank and adapter.lora_magnitude is not None:
                count -= part.size
            if not rank and adapter.lora_bias is not None:
                count -= part.size
    return count, size


def _count_whole(module: SavedModule, name: str) -> tuple[int, int]:
    """Number of trained elements, and total number of elements."""
    size = _size(module.adapters[name])
    if isinstance(module, TrainedCopy) and (chosen := module.chosen(name)) is not None:
        return size * sum(chosen) // len(chosen), size
    return size, size


def _size(module: nnx.Module) -> int:
    """Number of trainable elements in a module."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return sum(math.prod(variable.get_value().shape) for _, variable in flat)
