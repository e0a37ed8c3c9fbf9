"""Picks how quantized layers multiply on the current device, by measuring."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_flax.errors import LoraError
from lora_flax.index import ModelIndex
from lora_flax.kernels.blocks import Platform
from lora_flax.kernels.timing import MatmulChoice, compare
from lora_flax.quant import pallas as fused
from lora_flax.quant.array import QuantizedArray
from lora_flax.quant.layer import QuantizedDense

ANY_ROWS = 2**62


def use_fused_matmul(model: nnx.Module, platform: Platform, max_rows: int = ANY_ROWS) -> None:
    """Makes quantized layers use the kernels of `lora_flax.quant.pallas`, in place.

    Args:
        model: quantized, on a single device, since XLA cannot partition a kernel over a mesh.
        platform: the platform it runs on.
        max_rows: inputs with more rows use XLA; 0 sends all inputs to XLA.

    Raises:
        LoraError: if no layer has a weight that the kernels support.
    """
    layers = _layers(model)
    if not layers:
        raise LoraError("no layer has 4-bit weights with inputs and outputs in multiples of 512")
    for layer in layers:
        layer.platform, layer.fused_rows = platform, max_rows


def choose_matmul(
    model: nnx.Module, platform: Platform, rows: int, dtype: Any, backward: bool = False
) -> MatmulChoice | None:
    """Times both methods and selects the faster one for inputs of up to `rows` rows.

    Args:
        model: quantized, on a single device.
        platform: the platform it runs on.
        rows: number of input rows: all axes but the last.
        dtype: dtype of the inputs.
        backward: also time the gradient with respect to the inputs, as in training.

    Returns:
        The timings; None if no layer has a weight that the kernel supports.
    """
    layers = _layers(model)
    if not layers:
        return None
    kernels = [layer.kernel.get_value() for layer in layers]
    stack = max(kernels, key=lambda kernel: math.prod(kernel.kernel_shape))
    kernel = stack[(0,) * (stack.ndim - 2)]
    x = jnp.ones((rows, kernel.shape[0]), dtype)
    ways: dict[str, Callable[..., Any]] = {
        "xla": functools.partial(_multiply, platform=None),
        "pallas": functools.partial(_multiply, platform=platform),
    }
    if backward:
        ways = {name: _with_gradient(run) for name, run in ways.items()}
    choice = compare("4-bit matmul", rows, ways, x, kernel)
    if choice.kernel == "pallas":
        use_fused_matmul(model, platform, rows)
    return choice


def _layers(model: nnx.Module) -> list[QuantizedDense]:
    layers = ModelIndex(model).of_type(QuantizedDense).values()
    return [layer for layer in layers if _fits(layer.kernel.get_value())]


def _fits(kernel: QuantizedArray) -> bool:
    return fused.fits(kernel.kernel_shape, kernel.kind)


def _multiply(x: jax.Array, kernel: QuantizedArray, platform: Platform | None) -> jax.Array:
    return kernel.matmul(x, platform)


def _with_gradient(run: Callable[..., jax.Array]) -> Callable[..., Any]:
    def both(x: jax.Array, kernel: QuantizedArray) -> Any:
        out, pull = jax.vjp(lambda x: run(x, kernel), x)
        return pull(out)

    return both
