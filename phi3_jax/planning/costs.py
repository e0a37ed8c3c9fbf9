"""What a program does: matrix products from its jaxpr, collectives from its compiled text.

XLA's `cost_analysis` counts a loop body once and ignores Pallas kernels. Here kernels are counted,
and loop bodies are multiplied by how often they run.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

from jax.extend.core import jaxprs_in_params

from phi3_jax.planning.hlo import Instruction, Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\})")


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or kernel of a jaxpr, all of its runs together.

    Attributes:
        scope: its JAX scopes from the outside in, such as `scan/jvp()/mlp`.
        flops: of matrix products, counting a multiply-add as two.
        bytes: of operands and results.
        kernel: whether it is a Pallas kernel.
    """

    scope: str
    flops: int
    bytes: int
    kernel: bool = False

    def times(self, count: int) -> Product:
        """Run `count` times as often."""
        return dataclasses.replace(self, flops=count * self.flops, bytes=count * self.bytes)

    def shared_by(self, devices: int) -> Product:
        """One device's part."""
        return dataclasses.replace(self, flops=self.flops // devices, bytes=self.bytes // devices)


def matmul_flops(jaxpr: Any, while_trips: int = 1) -> int:
    """FLOPs of all matrix products in a jaxpr; arguments as in `products`."""
    return total_flops(products(jaxpr, while_trips))


def products(jaxpr: Any, while_trips: int = 1, scope: str = "") -> list[Product]:
    """All matrix products and kernels in a jaxpr.

    Args:
        jaxpr: `jax.make_jaxpr(f)(...)`, or an inner jaxpr.
        while_trips: iterations of a `while`, which a jaxpr does not record (a `scan` does).
        scope: the scopes around it.
    """
    found = []
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if not (equation.outvars or equation.effects):  # left of a kernel whose results are kept
            continue
        name, params = equation.primitive.name, equation.params
        own = f"{scope}/{equation.source_info.name_stack}"
        avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(avals[0].shape[axis] for axis in contracted)
            flops = 2 * math.prod(avals[-1].shape) * depth
            found.append(Product(own, flops, _aval_bytes(avals)))
            continue
        inner = [products(part, while_trips, own) for part in jaxprs_in_params(params)]
        if name == "pallas_call":
            flops = sum(map(total_flops, inner)) * math.prod(params["grid_mapping"].grid)
            found.append(Product(own, flops, _aval_bytes(avals), kernel=True))
            continue
        if name == "cond":
            inner = [max(inner, key=total_flops)]
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "while":
            times = while_trips
        elif name == "shard_map":
            times = params["mesh"].size
        found += [product.times(times) for part in inner for product in part]
    return found


def total_flops(found: list[Product]) -> int:
    """FLOPs of all of them."""
    return sum(product.flops for product in found)


def _aval_bytes(avals: list[Any]) -> int:
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)


def collective_bytes(program: Program, while_trips: int = 1) -> dict[str, int]:
    """Bytes each chip receives or sends per run, by kind of collective: the larger operand side.

    Args:
        program: a compiled program, for one chip.
        while_trips: iterations of loops whose trip count is not in the text.
    """
    total: collections.Counter[str] = collections.Counter()
    for instruction, times, computation in program.run(while_trips):
        if instruction.opcode == "while":
            for body in filter(_is_ring, instruction.called):
                total["collective-permute"] += times * _ring_bytes(program.computations[body])
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES and not _is_ring(computation):
            operands = instruction.rest.split("), ")[0]
            total[kind] += times * max(_bytes(instruction.result), _bytes(operands))
    return dict(total)


def _is_ring(computation: str) -> bool:
    """Whether this is the body of a matmul that passes one operand around as it computes."""
    return "windowed_dot_general" in computation


def _ring_bytes(body: list[Instruction]) -> int:
    """Each chip receives g - 1 of g shards, however the compiler unrolled the loop."""
    sizes = [0]
    for instruction in body:
        is_collective = instruction.opcode.removesuffix("-start") in COLLECTIVES
        if is_collective and (pairs := _PAIRS.search(instruction.rest)):
            shards = pairs[1].count("{") - 2  # minus its own; one bracket encloses them all
            sizes.append(shards * _bytes(instruction.result))
    return max(sizes)


def _bytes(text: str) -> int:
    """Bytes of the largest array in a piece of HLO; for a tuple, its largest member."""
    sizes = [
        _BYTES.get(kind, 4) * math.prod(int(size) for size in dims.split(",") if size)
        for kind, dims in _SHAPE.findall(text)
    ]
    return max(sizes, default=0)
