"""What a program computes: the matrix products and kernels of its jaxpr.

XLA's `cost_analysis` counts a loop body once and ignores Pallas kernels. Here kernels are counted,
and loop bodies are multiplied by how often they run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Var, jaxprs_in_params

from phi3_jax.model.remat import LANES


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or kernel of a jaxpr, all of its runs together.

    Attributes:
        scope: its JAX scopes from the outside in, such as `scan/jvp()/mlp`.
        flops: of matrix products, counting a multiply-add as two.
        bytes: of operands and results; of a kernel's, with the last axis padded as a TPU stores it.
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


def products(
    jaxpr: Any, while_trips: int = 1, scope: str = "", known: Sequence[Any] = ()
) -> list[Product]:
    """All matrix products and kernels in a jaxpr.

    Args:
        jaxpr: `jax.make_jaxpr(f)(...)`, or an inner jaxpr.
        while_trips: iterations of a `while`, which a jaxpr does not record (a `scan` does).
        scope: the scopes around it.
        known: values of its arguments, None for those that are not constant.
    """
    found = []
    inside = getattr(jaxpr, "jaxpr", jaxpr)
    values = dict(zip(inside.constvars, getattr(jaxpr, "consts", ()), strict=False))
    values |= dict(zip(inside.invars, known, strict=False))
    for equation in _needed(inside):
        name, params = equation.primitive.name, equation.params
        own = f"{scope}/{equation.source_info.name_stack}"
        avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(avals[0].shape[axis] for axis in contracted)
            flops = 2 * math.prod(avals[-1].shape) * depth
            found.append(Product(own, flops, _aval_bytes(avals)))
            continue
        constants = [values.get(v) if isinstance(v, Var) else v.val for v in equation.invars]
        if name == "cond":
            constants = constants[1:]
        inner = [
            products(part, while_trips, own, constants if name != "while" else ())
            for part in jaxprs_in_params(params)
        ]
        if name == "pallas_call":
            each = sum(map(total_flops, inner)) * math.prod(params["grid_mapping"].grid)
            flops = round(each * _share_of_blocks(str(params["name"]), constants))
            size, stated = _aval_bytes(avals, LANES), params["cost_estimate"]
            if stated is not None:
                flops, size = stated.flops, stated.bytes_accessed
            found.append(Product(own, flops, size, kernel=True))
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


def _share_of_blocks(kernel: str, operands: Sequence[Any]) -> float:
    """The share of its grid that splash attention computes; 1 for other kernels.

    Its second operand has a number for each block of queries and keys: 0 if the mask hides all of
    it, and the kernel then passes over it.
    """
    if not kernel.startswith("splash") or operands[1] is None:
        return 1.0
    return float(np.mean(np.asarray(operands[1]) != 0))


def _needed(jaxpr: Any) -> list[Any]:
    """The equations whose results are used: JAX leaves kernels whose are not to XLA to remove."""
    used = {variable for variable in jaxpr.outvars if isinstance(variable, Var)}
    needed = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not used.isdisjoint(equation.outvars):
            used |= {variable for variable in equation.invars if isinstance(variable, Var)}
            needed.append(equation)
    return needed[::-1]


def total_flops(found: list[Product]) -> int:
    """FLOPs of all of them."""
    return sum(product.flops for product in found)


def _aval_bytes(avals: list[Any], lanes: int = 1) -> int:
    """Bytes of arrays whose last axis is stored as a multiple of `lanes`."""
    total = 0
    for aval in avals:
        *axes, last = aval.shape or (1,)
        total += math.prod(axes) * (-(-last // lanes) * lanes) * aval.dtype.itemsize
    return total
