"""LoftQ (Li et al. 2023, arXiv:2310.08659): A B is initialized to the quantization error."""

from __future__ import annotations

import numpy as np
from flax import nnx

from lora_flax.config import DEFAULT
from lora_flax.init.residual import ReadWeight, balanced, quantized_layers, start_from_residual


def replace_lora_weights_loftq(
    model: nnx.Module, read: ReadWeight, adapter_name: str = DEFAULT
) -> None:
    """Sets A and B so that `Q + A B scale` is as close to the weight as rank r allows.

    Like PEFT's function of the same name, this does one step of LoftQ's alternation. The base is
    still the plain quantization of the checkpoint, so the adapter fits any copy of it. PEFT does
    not account for `scale`; the results match for `lora_alpha = r`.

    Args:
        model: quantized and wrapped.
        read: returns a layer's weight `[in, out]` from before quantization, given its PyTorch name,
            such as `model.layers.0.mlp.down_proj`.
        adapter_name: which adapter.

    Raises:
        LoraError: if no quantized layer has such an adapter.
    """
    for layer in quantized_layers(model, adapter_name):
        start_from_residual(layer, read, adapter_name, _singular)


def _singular(member: int, residual: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    u, sizes, vt = np.linalg.svd(residual, full_matrices=False)
    return balanced(u[:, :rank], sizes[:rank], vt[:rank])
