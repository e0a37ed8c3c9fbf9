"""The side of its layer that each axis of an array runs along."""

from __future__ import annotations

import math

import jax
import pytest
from flax import nnx

import lora_flax
from lora_flax import Axis
from tests.lora_flax.encoder import Encoder

NF4 = lora_flax.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)


def test_by_name():
    def axes(name: str, ndim: int) -> tuple:
        return lora_flax.axes_of(("layers", "mlp", "up_proj", *name.split(".")), ndim)

    inputs, outputs = Axis("in"), Axis("out")
    assert axes("kernel", 2) == axes("embedding", 2) == (inputs, outputs)
    assert axes("kernel", 4) == (None, None, inputs, outputs)
    assert axes("adapters.default.lora_A", 3) == (None, inputs, None)
    assert axes("adapters.default.lora_B", 2) == (None, outputs)
    assert axes("base.kernel.codes", 3) == (None, Axis("in", 32), outputs)
    assert axes("base.kernel.absmax", 3) == (None, inputs, outputs)
    for small in ("base.kernel.nested_absmax", "base.kernel.offset", "bias", "scale"):
        assert axes(small, 2) == ()
    assert lora_flax.axes_of((), 0) == ()


class Net(nnx.Module):
    def __init__(self):
        self.up_proj = nnx.Linear(128, 192, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [Net, lambda: Encoder(nnx.Rngs(0))])
def test_large_arrays_have_axes_of_their_sides(make):
    """In a wrapped model: any array with two large axes is split, along axes of the right size."""
    model = make()
    if isinstance(model, Net):
        lora_flax.quantize(model, NF4)
    lora_flax.wrap(model, lora_flax.LoraConfig(r=2, target_modules="all-linear"))
    kernels = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, lora_flax.LoRADense):
            kernels[path] = module.kernel.shape
    assert kernels
    seen = set()
    for path, leaf in jax.tree.leaves_with_path(nnx.state(model)):
        names = [getattr(part, "key", getattr(part, "name", None)) for part in path]
        names = tuple(name for name in names if name != "value")
        shape = next((kernels[names[:n]] for n in range(len(names)) if names[:n] in kernels), None)
        if shape is None:
            continue
        axes = lora_flax.axes_of(names, leaf.ndim)
        seen.add(names[-1])
        for axis, size in zip(axes, leaf.shape, strict=bool(axes)):
            if axis is not None:
                side = shape[-2] if axis.side == "in" else shape[-1]
                assert side % (size // axis.unit) == 0 and size % axis.unit == 0, names
        if not axes:
            assert math.prod(leaf.shape) <= max(shape), names
    assert {"lora_A", "lora_B", "codes" if isinstance(model, Net) else "kernel"} <= seen
