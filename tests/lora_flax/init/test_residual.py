"""Starts from the quantization error: LoftQ against PEFT, and what it shares with QERA."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition

import lora_flax
from lora_flax import LoraConfig, LoraError
from lora_flax.init.residual import balanced, quantized_layers, start_from_residual
from tests.lora_flax.quant.test_layer import DEPTH, KINDS, Stack, X


def kernels_of(model: Stack):
    """The kernels of the stack, and what reads one of them."""
    kernels = {name: np.asarray(getattr(model.layers, name).kernel[...]) for name in
               ("up_proj", "down_proj")}  # fmt: skip

    def read(name: str) -> np.ndarray:
        _, index, layer = name.split(".")
        return kernels[layer][int(index)]

    return kernels, read


def test_loftq_is_pefts():
    """A and B are PEFT's decomposition of what bitsandbytes lost, where alpha is r."""
    model = Stack()
    kernels, read = kernels_of(model)
    exact = model(X)
    lora_flax.quantize(model, KINDS["nf4"])
    rounded = model(X)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["up_proj", "down_proj"],
                        init_lora_weights="loftq")  # fmt: skip
    lora_flax.wrap(model, config)
    np.testing.assert_array_equal(model(X), rounded)
    lora_flax.replace_lora_weights_loftq(model, read)
    for name, stack in kernels.items():
        adapter = getattr(model.layers, name).adapters.default
        for layer in range(DEPTH):
            w = torch.from_numpy(stack[layer].T.copy())
            codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
            lost = w - bnb.dequantize_4bit(codes, state)
            parts = _low_rank_decomposition(lost, reduced_rank=16)
            expected = (parts["L"] @ parts["R"]).numpy().T
            found = 2.0 * adapter.lora_A[...][layer] @ adapter.lora_B[...][layer]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert jnp.linalg.norm(model(X) - exact) < 0.9 * jnp.linalg.norm(rounded - exact)
    lora_flax.dequantize(model)
    with pytest.raises(LoraError, match="on quantized layers"):
        lora_flax.replace_lora_weights_loftq(model, read)


def test_each_member_gets_its_factors_of_its_residual():
    """At full rank, `A B scale` equals the quantization error."""
    model = Stack()
    kernels, read = kernels_of(model)
    lora_flax.quantize(model, KINDS["int8"])
    residual = kernels["up_proj"] - np.asarray(model.layers.up_proj.kernel[...])
    lora_flax.wrap(model, LoraConfig(r=64, lora_alpha=192, target_modules=["up_proj", "head"]))
    layers = quantized_layers(model, "default")
    assert [layer.name for layer in layers] == ["head", "layers.up_proj"]
    seen = []

    def factors(member: int, error: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
        seen.append((member, rank))
        np.testing.assert_allclose(error, residual[member], rtol=0, atol=1e-6)
        return balanced(*np.linalg.svd(error, full_matrices=False))

    start_from_residual(layers[1], read, "default", factors)
    assert seen == [(member, 64) for member in range(DEPTH)]
    adapter = model.layers.up_proj.adapters.default
    a, b = adapter.lora_A[...], adapter.lora_B[...]
    np.testing.assert_allclose(3.0 * a @ b, residual, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(a), jnp.linalg.norm(b), rtol=1e-4)
    with pytest.raises(LoraError, match="adapter 'other' on quantized layers"):
        quantized_layers(model, "other")


def test_the_magnitudes_of_dora_are_those_of_the_sum():
    """The model computes what it does without DoRA: the norms count A B, as PEFT's do."""
    outputs = []
    for use_dora in (False, True):
        model = Stack()
        _, read = kernels_of(model)
        lora_flax.quantize(model, KINDS["nf4"])
        lora_flax.wrap(model, LoraConfig(r=16, target_modules=["up_proj"], use_dora=use_dora))
        lora_flax.replace_lora_weights_loftq(model, read)
        outputs.append(model(X))
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    layer = model.layers.up_proj
    adapter = layer.adapters.default
    summed = layer.base.kernel[...] + 0.5 * adapter.lora_A[...] @ adapter.lora_B[...]
    norms = jnp.linalg.norm(summed, axis=-2)
    np.testing.assert_allclose(adapter.lora_magnitude[...], norms, rtol=1e-5)
