"""A and B that approximate what quantization lost: what LoftQ and QERA share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.errors import LoraError
from lora_flax.host import on_host, place_like
from lora_flax.index import Layer, ModelIndex
from lora_flax.init.weights import set_magnitude
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.quant.layer import QuantizedDense

# Reads a layer's weight `[in, out]` from before quantization, given its PyTorch name, such as
# `model.layers.0.mlp.down_proj`.
ReadWeight = Callable[[str], np.ndarray]
# From a member's index, its quantization error `[in, out]` and r: factors `[in, r]` and `[r, out]`.
Factors = Callable[[int, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def quantized_layers(model: nnx.Module, adapter_name: str) -> list[Layer]:
    """The quantized layers that have such an adapter.

    Raises:
        LoraError: if there are none.
    """
    found = [
        layer
        for layer in ModelIndex(model).layers
        if isinstance(layer.module, LoRALayer)
        and adapter_name in layer.module.adapters
        and isinstance(layer.module.base, QuantizedDense)
    ]
    if not found:
        raise LoraError(f"LoftQ and QERA need an adapter {adapter_name!r} on quantized layers")
    return found


def start_from_residual(layer: Layer, read: ReadWeight, name: str, factors: Factors) -> None:
    """Sets A and B of a quantized layer so that `A B scale` approximates the quantization error.

    DoRA's magnitudes become the norms of `Q + A B scale`, as where PEFT starts with LoftQ.

    Args:
        layer: quantized and wrapped.
        read: see `ReadWeight`.
        name: name of the adapter.
        factors: see `Factors`; A and B get equal shares of the magnitude of their product.
    """
    wrapper: Any = layer.module
    base, adapter = wrapper.base, wrapper.adapters[name]
    spec, quantized = adapter.spec, base.kernel.get_value()
    members = math.prod(layer.stack)
    a = np.zeros((members, layer.features_in, len(spec.slices) * spec.rank), np.float32)
    b = np.zeros((members, spec.rank, spec.width), np.float32)
    scales = np.asarray(adapter.scale[...]).reshape(members, -1)
    for m, torch_name in enumerate(layer.names):
        member = quantized[np.unravel_index(m, layer.stack)]
        rounded = on_host(member.dequantize(jnp.float32))
        residual = read(torch_name).astype(np.float32) - rounded
        for s, part in enumerate(spec.slices):
            if rank := spec.ranks[m][s]:
                columns = residual[:, part.start : part.start + part.size]
                left, right = factors(m, columns, rank)
                root = np.sqrt(scales[m, s])
                a[m, :, s * spec.rank : s * spec.rank + rank] = left / root
                b[m, :rank, spec.columns(s)] = right / root
    for variable, value in ((adapter.lora_A, a), (adapter.lora_B, b)):
        old = variable[...]
        variable.set_value(place_like(old, value.reshape(old.shape)))
    if adapter.lora_magnitude is not None:
        set_magnitude(adapter, wrapper.weight)


def balanced(u: np.ndarray, sizes: np.ndarray, vt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`u diag(sizes) vt` as two factors of equal magnitude."""
    root = np.sqrt(sizes)
    return u * root, root[:, None] * vt
