"""QERA against its closed form, written out with the root of the inputs' second moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_flax
from lora_flax import BitsAndBytesConfig, LoraConfig, LoraError
from tests.lora_flax.quant.test_layer import DEPTH, Stack

RANK = 4
NAMES = ("up_proj", "down_proj")
CONFIG = LoraConfig(r=RANK, lora_alpha=12, target_modules=list(NAMES), init_lora_weights="qera")


def batches() -> list[np.ndarray]:
    """Inputs of unequal scale, off center, as those of language models are."""
    rng = np.random.default_rng(0)
    scales = np.exp(rng.standard_normal(64)).astype(np.float32)
    return [rng.standard_normal((6, 50, 64), np.float32) * scales + scales for _ in range(3)]


def prepared():
    """A quantized, wrapped stack; its kernels before, what reads them, and the inputs of each."""
    model = Stack()
    kernels = {name: np.asarray(getattr(model.layers, name).kernel[...]) for name in NAMES}
    lora_flax.quantize(model, BitsAndBytesConfig(load_in_4bit=True))
    rounded = {name: np.asarray(getattr(model.layers, name).kernel[...]) for name in NAMES}
    x = np.concatenate(batches()).reshape(-1, 64).astype(np.float64)
    inputs: dict = {name: [] for name in NAMES}
    for layer in range(DEPTH):
        hidden = np.tanh(x @ rounded["up_proj"][layer])
        inputs["up_proj"].append(x)
        inputs["down_proj"].append(hidden)
        x = x + hidden @ rounded["down_proj"][layer]
    lora_flax.wrap(model, CONFIG, rngs=nnx.Rngs(0))

    def read(name: str) -> np.ndarray:
        _, index, layer = name.split(".")
        return kernels[layer][int(index)]

    lost = {name: kernels[name] - rounded[name] for name in NAMES}
    return model, read, lost, inputs


def closed_form(lost: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`R^(-1/2) SVD_r(R^(1/2) D)`, theorem 1 of the paper."""
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    u, sizes, vt = np.linalg.svd(root @ lost, full_matrices=False)
    return inverse @ (u[:, :RANK] * sizes[:RANK]) @ vt[:RANK]


def test_it_is_the_closed_form():
    model, read, lost, inputs = prepared()
    lora_flax.initialize_lora_qera_weights(model, read, batches(), lambda m, batch: m(batch))
    for name in NAMES:
        adapter = getattr(model.layers, name).adapters.default
        for layer in range(DEPTH):
            a, b = adapter.lora_A[...][layer], adapter.lora_B[...][layer]
            assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=1e-4)
            found, x, d = 3.0 * np.asarray(a @ b), inputs[name][layer], lost[name][layer]
            best = closed_form(d, x)

            def error(product, x=x, d=d):
                return np.linalg.norm(x @ (d - product)) ** 2

            assert error(found) <= 1.01 * error(best)
            u, sizes, vt = np.linalg.svd(d, full_matrices=False)
            assert error(best) < 0.95 * error((u[:, :RANK] * sizes[:RANK]) @ vt[:RANK])  # LoftQ's
            if name == "up_proj":  # no more inputs than directions: nothing is approximated
                np.testing.assert_allclose(found, best, rtol=0, atol=2e-2 * np.abs(best).max())


def test_masked_inputs_do_not_count():
    clean = [{"x": x, "real": np.ones(x.shape[:2], bool)} for x in batches()]
    dirty = []
    for x in batches():
        rubbish = np.full((6, 20, 64), 50, np.float32)
        real = np.ones((6, 70), bool)
        real[:, 50:] = False
        dirty.append({"x": np.concatenate([x, rubbish], axis=1), "real": real})
    starts = []
    for data in (clean, dirty):
        model, read, *_ = prepared()
        lora_flax.initialize_lora_qera_weights(
            model, read, data, lambda m, batch: m(batch["x"]), lambda batch: batch["real"]
        )
        starts.append(jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    for a, b in zip(*starts, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * jnp.abs(b).max())


def test_what_it_needs():
    model, read, *_ = prepared()
    with pytest.raises(LoraError, match="at least one batch"):
        lora_flax.initialize_lora_qera_weights(model, read, [], lambda m, batch: m(batch))
    lora_flax.dequantize(model)
    with pytest.raises(LoraError, match="on quantized layers"):
        lora_flax.initialize_lora_qera_weights(model, read, batches(), lambda m, b: m(b))
