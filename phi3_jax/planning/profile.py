"""A step's cost by part, as its compiler estimates it.

The compiler for TPUs writes an estimate of its cycles into most instructions of a program. They are
added up here, loops by their trip counts. Nothing runs, and waiting for memory that the compiler
expects to hide is left out.

Pallas kernels have no estimate. They count as their matrix products at the chip's full rate, or
their operands and results at full bandwidth, whichever takes longer.

Collectives have none either. They count as their bytes at the interconnect's full rate, an
all-to-all's for each link on their way, and as hidden while estimated work is scheduled between
their start and their end.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.flops import lora_step_flops
from phi3_jax.planning.collectives import COLLECTIVES as COLLECTIVE_KINDS
from phi3_jax.planning.collectives import Overlap, overlap
from phi3_jax.planning.costs import Product
from phi3_jax.planning.hlo import Instruction, Program
from phi3_jax.planning.parts import COLLECTIVES, COPIES, OTHER, part_of, phase_of
from phi3_jax.planning.topology import Chip

# Part and phase of a step.
Place = tuple[str, str]
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = 'custom_call_target="tpu_custom_call"'
_MATMULS = {"dot", "convolution"}
# Operations that move data and compute nothing.
_MOVES = {
    "bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "copy-done", "copy-start",
    "dynamic-slice", "dynamic-update-slice", "get-tuple-element", "iota", "pad", "parameter",
    "reshape", "reverse", "slice", "transpose", "tuple",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Profile:
    """Estimated cycles of one step on one chip.

    Attributes:
        chip: the chip.
        cycles: by part and phase (see `phi3_jax.planning.parts`), kernels included.
        kernels: of these, the cycles of kernels, which the compiler gives no estimate for.
        ideal: cycles of the matrix products at the chip's full rate, by part and phase.
        model_flops: FLOPs that the model needs for one chip's share of the step
            (`model_flops`).
        overlap: the collectives, and how much of their time is hidden by this work.
    """

    chip: Chip
    cycles: dict[Place, float]
    kernels: float
    ideal: dict[Place, float]
    model_flops: float
    overlap: Overlap = dataclasses.field(default_factory=Overlap)

    @property
    def seconds(self) -> float:
        """Time of a step by the compiler's estimate, without collectives."""
        return sum(self.cycles.values()) / self.chip.clock

    @property
    def seconds_with_collectives(self) -> float:
        """`seconds` and what the chip waits for collectives."""
        return self.seconds + self.overlap.exposed / self.chip.clock

    @staticmethod
    def by_part(cycles: dict[Place, float]) -> dict[str, float]:
        """The sum over all phases."""
        total: dict[str, float] = collections.defaultdict(float)
        for (part, _), count in cycles.items():
            total[part] += count
        return dict(total)

    def utilization(self, seconds: float) -> float:
        """Model FLOPs utilization of a step that takes this long."""
        return self.model_flops / seconds / self.chip.flops


def profile(
    program: Program,
    products: Sequence[Product],
    chip: Chip,
    needed: float,
    while_trips: int,
    hops: float = 1.0,
) -> Profile:
    """Add up a compiled step.

    Args:
        program: the compiled step, for one chip.
        products: the matrix products of the same step on one chip.
        chip: the chip it was compiled for.
        needed: see `Profile.model_flops`.
        while_trips: iterations of loops whose trip count is not in the text.
        hops: see `mean_hops`.

    Raises:
        UserError: the program has no estimates.
    """
    cycles: dict[Place, float] = collections.defaultdict(float)
    runs: collections.Counter[Place] = collections.Counter()
    for instruction, times, _ in program.run(while_trips):
        if found := _ESTIMATE.search(instruction.rest):
            cycles[_place(program, instruction)] += times * int(found[1])
        elif _KERNEL in instruction.rest:
            runs[_place(program, instruction)] += times
    if not cycles:
        raise UserError("this compiler writes no estimates into its programs; profile a TPU's")
    ideal: dict[Place, float] = collections.defaultdict(float)
    kernels: dict[Place, float] = collections.defaultdict(float)
    for product in products:
        place = part_of(product.scope), phase_of(product.scope)
        full_rate = product.flops / chip.flops * chip.clock
        ideal[place] += full_rate
        if product.kernel:
            own = max(full_rate, product.bytes / chip.bandwidth * chip.clock)
            cycles[place] += own
            kernels[place] += own

    def cycles_of(instruction: Instruction) -> float:
        if found := _ESTIMATE.search(instruction.rest):
            return int(found[1])
        if _KERNEL not in instruction.rest:
            return 0.0
        place = _place(program, instruction)
        return kernels.get(place, 0.0) / runs[place]

    per_byte = chip.clock / chip.interconnect
    beside = overlap(program, cycles_of, per_byte, while_trips, hops)
    return Profile(chip, dict(cycles), sum(kernels.values()), dict(ideal), needed, beside)


def model_flops(config: Phi3Config, rows: int, length: int) -> float:
    """FLOPs that a LoRA step needs (`lora_step_flops`), all of its tokens being learned.

    Args:
        config: the architecture.
        rows, length: the tokens of the step, taken as rows of one segment.
    """
    positions = np.arange(length)
    every = np.ones(length, bool)
    return rows * lora_step_flops(config, positions, every, every)


def _place(program: Program, instruction: Instruction) -> Place:
    """Part and phase; a fusion belongs to the matmul in it, its own name, or its last known one.

    A fusion that carries a collective along belongs to its own work.
    """
    inside = [i for i in program.inside(instruction) if not i.opcode.startswith(COLLECTIVE_KINDS)]
    names = [i.name for i in inside if i.opcode in _MATMULS] + [instruction.name]
    names += [i.name for i in reversed(inside) if part_of(i.name) != OTHER]
    name = next(filter(None, names), "")
    part, phase = part_of(name), phase_of(name)
    kinds = {inner.opcode for inner in inside} - {"fusion"} or {instruction.opcode}
    if instruction.opcode.startswith(COLLECTIVE_KINDS):
        part = COLLECTIVES
    elif part == OTHER and kinds <= _MOVES:
        part = COPIES
    return part, phase
