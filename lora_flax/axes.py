"""Which axes of an array run along the inputs or the outputs of its layer, for sharding.

A mesh that knows how to split a layer's inputs and outputs can split every array of that layer
the same way, whether it is plain, quantized or wrapped, without knowing what the array is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from lora_flax.quant.encoding import BLOCK_BYTES


class Axis(NamedTuple):
    """An axis along one side of a layer's weight.

    Attributes:
        side: `in` or `out`.
        unit: it may only be split into multiples of this many indices.
    """

    side: Literal["in", "out"]
    unit: int = 1


_IN, _OUT = Axis("in"), Axis("out")
# The last axes of each array, by name. Arrays that are not listed are small.
_AXES: dict[str, tuple[Axis | None, ...]] = {
    "kernel": (_IN, _OUT),
    "embedding": (_IN, _OUT),
    "lora_A": (_IN, None),
    "lora_B": (None, _OUT),
    # 32 bytes hold one block of 64 inputs, which has one scale.
    "codes": (Axis("in", BLOCK_BYTES), _OUT),
    "absmax": (_IN, _OUT),
}


def axes_of(path: Sequence[str], ndim: int) -> tuple[Axis | None, ...]:
    """The axes of an array of a layer's weight or of its update.

    Args:
        path: attribute names from the model to the array, as in `nnx.state(model)`; the arrays of a
            `QuantizedArray` are below its variable, `(..., "kernel", "codes")`.
        ndim: number of axes of the array.

    Returns:
        One entry per axis, None for an axis that belongs to neither side (a stack, a convolution's
        window, the rank); an empty tuple for an array that should not be split.
    """
    last = _AXES.get(path[-1], ()) if path else ()
    if not last or ndim < len(last):
        return ()
    return (*(None,) * (ndim - len(last)), *last)
