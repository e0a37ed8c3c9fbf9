"""What was wrapped and how much of the model trains, as data and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flax import nnx

from lora_flax.layers import LoRADense
from lora_flax.select import trainable_filter
from lora_flax.targets import find_layers


@dataclass(frozen=True)
class LayerReport:
    """One wrapped layer. `stack`: how many layers it holds, 1 if it is not a stack."""

    name: str
    stack: int
    features_in: int
    features_out: int
    r: int

    @property
    def parameters(self) -> int:
        """Elements of A and B, over the whole stack."""
        return self.stack * self.r * (self.features_in + self.features_out)


@dataclass(frozen=True)
class Report:
    """The wrapped layers, and how many parameters train (biases included) out of how many."""

    layers: tuple[LayerReport, ...]
    trainable: int
    total: int


def report(model: nnx.Module) -> Report:
    """Describes a wrapped model.

    Raises:
        LoraError: if it has no LoRA layers, or is merged.
    """
    trains = trainable_filter(model)
    trainable = total = 0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        size = math.prod(variable.get_value().shape)
        total += size
        trainable += size if trains(path, variable) else 0
    layers = tuple(
        LayerReport(
            layer.name,
            math.prod(layer.stack),
            layer.features_in,
            layer.features_out,
            layer.module.config.r,
        )
        for layer in find_layers(model)
        if isinstance(layer.module, LoRADense)
    )
    return Report(layers, trainable, total)


def format_table(report: Report) -> str:
    """The report as lines of text, one a layer, the sum below."""
    rows = [("layer", "stack", "in", "out", "r", "trainable")]
    rows += [
        (
            layer.name,
            str(layer.stack),
            str(layer.features_in),
            str(layer.features_out),
            str(layer.r),
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
