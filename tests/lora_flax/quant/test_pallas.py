"""The kernels that dequantize inside a multiplication, interpreted, against XLA's way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_flax
from lora_flax import BitsAndBytesConfig, LoraError, QuantizedArray, QuantizedDense
from lora_flax.kernels import timing
from lora_flax.quant import pallas as fused
from tests.lora_flax.quant.test_layer import Stack

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("platform", ["tpu_interpreted", "gpu_interpreted"])
def test_values_and_gradients_are_those_of_xla(kind, double, dtype, platform):
    plain = 0.02 * jax.random.normal(jax.random.key(0), (1024, 1024))
    kernel = QuantizedArray.quantize(plain, kind, double)
    x = jax.random.normal(jax.random.key(1), (21, 1024)).astype(dtype)

    d_out = jax.random.normal(jax.random.key(2), (21, 1024)).astype(dtype)

    def run(platform):
        out, pull = jax.vjp(lambda x: kernel.matmul(x, platform), x)
        return out, *pull(d_out)

    for found, want in zip(run(platform), run(None), strict=True):
        assert found.dtype == dtype and found.shape == want.shape
        found, want = (a.astype(jnp.float32) for a in (found, want))
        # In bfloat16 both round a float32 sum once, so they are at most a step apart.
        relative = 0 if dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(found, want, rtol=relative, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("rows", [1, 50])
def test_fewer_and_more_rows_than_a_block(rows, platform, monkeypatch):
    monkeypatch.setitem(fused.MAX_ROWS, platform, 16)
    kernel = QuantizedArray.quantize(jax.random.normal(jax.random.key(0), (512, 512)), "nf4")
    x = jax.random.normal(jax.random.key(1), (rows, 512))
    want = x @ kernel.dequantize()
    found = kernel.matmul(x, f"{platform}_interpreted")
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)


def test_a_model_under_scan_and_remat():
    """All layers of a stack, and only as many rows as were asked for."""
    model = Stack(512, 512, depth=2)
    lora_flax.quantize(model, NF4)
    lora = lora_flax.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    lora_flax.wrap(model, lora, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (5, 512))

    def gradients():
        trains = lora_flax.mark_only_lora_as_trainable(model)
        graphdef, adapter, rest = nnx.split(model, trains, ...)
        loss = jax.jit(jax.grad(lambda a: (nnx.merge(graphdef, a, rest)(x) ** 2).sum()))
        return str(loss.trace(adapter).jaxpr), jax.tree.leaves(loss(adapter))

    plain, wanted = gradients()
    assert "pallas_call" not in plain
    lora_flax.use_fused_matmul(model, "tpu_interpreted")
    traced, found = gradients()
    assert "pallas_call" in traced
    for a, b in zip(found, wanted, strict=True):
        assert jnp.linalg.norm(a - b) <= 1e-5 * jnp.linalg.norm(b)
    lora_flax.use_fused_matmul(model, "tpu_interpreted", max_rows=4)
    assert "pallas_call" not in gradients()[0]


def test_the_choice_is_measured(monkeypatch):
    """Both run, with XLA as the faster one; a kernel for another device cannot run."""
    measure, seconds = timing._seconds, iter([1.0, 2.0, 1.0])

    def timed(run, *args):
        assert measure(run, *args) > 0
        return next(seconds)

    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "_seconds", timed)
    model = Stack(512, 512, depth=1)
    lora_flax.quantize(model, NF4)
    choice = lora_flax.choose_matmul(model, "tpu_interpreted", 3, jnp.float32, backward=True)
    assert choice.kernel == "xla" and set(choice.seconds) == {"xla", "pallas"}
    layers = [m for _, m in nnx.iter_modules(model) if isinstance(m, QuantizedDense)]
    assert all(layer.platform is None for layer in layers)
    choice = lora_flax.choose_matmul(model, "tpu", 3, jnp.float32)
    assert choice.kernel == "xla" and choice.problem and "cannot run" in str(choice)


def test_the_faster_one_is_taken():
    choice = lora_flax.MatmulChoice(8, {"xla": 2e-3, "pallas": 1e-3})
    assert choice.kernel == "pallas"
    assert str(choice) == "4-bit matmul of 8 rows: pallas (xla 2.000 ms, pallas 1.000 ms)"
    assert lora_flax.MatmulChoice(8, {"xla": 1.04e-3, "pallas": 1e-3}).kernel == "xla"


@pytest.mark.parametrize(
    "config", [NF4, BitsAndBytesConfig(load_in_8bit=True)], ids=["narrow", "int8"]
)
def test_weights_that_do_not_fit(config):
    model = Stack()
    lora_flax.quantize(model, config)
    assert lora_flax.choose_matmul(model, "tpu_interpreted", 3, jnp.float32) is None
    with pytest.raises(LoraError, match="multiples of 512"):
        lora_flax.use_fused_matmul(model, "tpu_interpreted")
