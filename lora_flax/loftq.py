"""LoftQ (Li et al. 2023, arXiv:2310.08659): A B starts as what quantising took from the weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax import nf4
from lora_flax.arrays import on_host
from lora_flax.errors import LoraError
from lora_flax.inject import DEFAULT
from lora_flax.layers import LoRALayer
from lora_flax.quantize import QuantizedDense
from lora_flax.targets import Layer, find_layers
from lora_flax.tensors import place_like


def replace_lora_weights_loftq(
    model: nnx.Module, read: Callable[[str], np.ndarray], adapter_name: str = DEFAULT
) -> None:
    """Sets A and B so that `Q + A B scale` is as near to the weight as rank r allows.

    PEFT's function of that name: one step of LoftQ's alternation, after which the base is still the
    plain quantisation of the checkpoint, so that the adapter fits any copy of it. PEFT leaves
    `scale` out of account, which is the same for `lora_alpha = r`.

    Args:
        model: quantised and wrapped.
        read: the weight `[in, out]` of a layer before it was quantised, by its PyTorch name, such
            as `model.layers.0.mlp.down_proj`.
        adapter_name: which adapter.

    Raises:
        LoraError: no quantised layer has such an adapter.
    """
    found = False
    for layer in find_layers(model):
        module = layer.module
        if not isinstance(module, LoRALayer) or adapter_name not in module.adapters:
            continue
        if isinstance(module.base, QuantizedDense):
            _start(layer, module, module.base, read, adapter_name)
            found = True
    if not found:
        raise LoraError(f"LoftQ needs an adapter {adapter_name!r} on layers that are quantised")


def _start(
    layer: Layer,
    wrapper: LoRALayer,
    base: QuantizedDense,
    read: Callable[[str], np.ndarray],
    name: str,
) -> None:
    adapter = wrapper.adapters[name]
    spec, lead = adapter.spec, len(layer.stack)
    members = math.prod(layer.stack)
    a = np.zeros((members, layer.features_in, len(spec.slices) * spec.rank), np.float32)
    b = np.zeros((members, spec.rank, spec.width), np.float32)
    scales = np.asarray(adapter.scale[...]).reshape(members, -1)
    for m, torch_name in enumerate(layer.names):
        arrays = {k: v.reshape(-1, *v.shape[lead:])[m] for k, v in base.arrays.items()}
        rounded = on_host(nf4.dequantize(arrays, base.quant_type, jnp.float32))
        lost, start = read(torch_name).astype(np.float32) - rounded, 0
        for s, part in enumerate(spec.slices):
            rank = spec.ranks[m][s]
            if rank:
                columns = lost[:, part.start : part.start + part.size]
                u, sizes, vt = np.linalg.svd(columns, full_matrices=False)
                root = np.sqrt(sizes[:rank] / scales[m, s])
                a[m, :, s * spec.rank : s * spec.rank + rank] = u[:, :rank] * root
                b[m, :rank, start : start + part.size] = root[:, None] * vt[:rank]
            start += part.size
    for variable, value in ((adapter.lora_A, a), (adapter.lora_B, b)):
        old = variable[...]
        variable.set_value(place_like(old, value.reshape(old.shape)))
