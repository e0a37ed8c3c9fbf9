"""Quantized layers: what they compute, and the surgery."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_flax
from lora_flax import BitsAndBytesConfig, LoraConfig, LoraError, QuantizedArray, QuantizedDense
from lora_flax.quant.layer import Quantized

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
KINDS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True),
    "nf4 double": NF4,
    "fp4 double": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
DEPTH = 4


class Dense(nnx.Module):
    def __init__(self, shape, rngs):
        self.kernel = nnx.Param(0.1 * jax.random.normal(rngs.params(), shape))

    def __call__(self, x, *, key=None):
        return x @ self.kernel[...]


class Stack(nnx.Module):
    """`DEPTH` layers under a scan, and a head."""

    def __init__(self, width: int = 64, hidden: int = 128, depth: int = DEPTH):
        rngs = nnx.Rngs(0)
        self.layers = nnx.Dict(
            up_proj=Dense((depth, width, hidden), rngs),
            down_proj=Dense((depth, hidden, width), rngs),
        )
        self.layers.stack_size = depth
        self.head = nnx.Linear(width, 64, rngs=rngs)
        self.head.bias.set_value(jnp.arange(64.0))

    def __call__(self, x):
        graphdef, state = nnx.split(self.layers)

        @jax.checkpoint
        def body(x, layer):
            layers = nnx.merge(graphdef, layer)
            return x + layers.down_proj(jnp.tanh(layers.up_proj(x))), None

        return self.head(jax.lax.scan(body, x, state)[0])


X = jax.random.normal(jax.random.key(1), (5, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_the_one_with_rounded_weights(kind):
    """Outputs, gradients of LoRA, surgery in any order, and the plain layers back."""
    model, config = Stack(), KINDS[kind]
    exact = model(X)
    lora_flax.quantize(model, config)
    quantized = model(X)
    assert 0 < jnp.abs(quantized - exact).max() < 1.5
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    lora_flax.wrap(model, lora, rngs=nnx.Rngs(0))

    def gradients(m):
        trains = lora_flax.mark_only_lora_as_trainable(m)
        graphdef, adapter, rest = nnx.split(m, trains, ...)
        return jax.jit(jax.grad(lambda a: (nnx.merge(graphdef, a, rest)(X) ** 2).sum()))(adapter)

    wrapped, before = model(X), gradients(model)
    other = Stack()
    lora_flax.wrap(other, lora, rngs=nnx.Rngs(0))
    lora_flax.quantize(other, config)
    np.testing.assert_array_equal(other(X), wrapped)

    lora_flax.dequantize(model)
    np.testing.assert_allclose(model(X), wrapped, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(gradients(model)), strict=True):
        assert jnp.linalg.norm(a - b) <= 1e-5 * jnp.linalg.norm(b)
    lora_flax.unwrap(model)
    np.testing.assert_allclose(model(X), quantized, rtol=1e-5, atol=1e-5)
    assert type(model.head) is nnx.Linear and type(model.layers.up_proj) is Dense
    np.testing.assert_array_equal(model.head.bias[...], jnp.arange(64.0))


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_one_variable(kind, graph):
    """It reads as the dense weight and survives NNX's transformations, in graph and tree mode."""
    with nnx.set_graph_mode(graph):
        model, config = Stack(), KINDS[kind]
        plain = model.layers.up_proj.kernel[...]
        lora_flax.quantize(model, config)
        kernel = model.layers.up_proj.kernel
        found = jax.tree.leaves(
            nnx.state(model, Quantized), is_leaf=lambda v: isinstance(v, Quantized)
        )
        assert len(found) == 3 and nnx.state(model.layers.up_proj, nnx.Param) == nnx.State({})
        array = kernel.get_value()
        assert isinstance(array, QuantizedArray) and array.shape == kernel.shape == plain.shape
        expected = QuantizedArray.quantize(plain, config.kind, config.bnb_4bit_use_double_quant)
        np.testing.assert_array_equal(kernel[...], expected.dequantize())
        np.testing.assert_array_equal(kernel[1], expected.dequantize()[1])
        abstract = nnx.eval_shape(lambda: model).layers.up_proj.kernel
        assert abstract.shape == plain.shape and abstract.dtype == plain.dtype

        copy = nnx.clone(model)
        nnx.update(copy, jax.tree.map(jnp.zeros_like, nnx.state(copy, Quantized)))
        assert not copy.layers.up_proj.kernel[...].any()
        graphdef, state = nnx.split(model)
        nnx.update(copy, state)
        np.testing.assert_array_equal(copy(X), model(X))
        jitted = jax.jit(lambda state: nnx.merge(graphdef, state)(X))(state)
        np.testing.assert_allclose(jitted, model(X), rtol=1e-5, atol=1e-5)


def test_options_of_lora_on_a_quantised_base():
    """DoRA and PiSSA read the kernel; merging needs the plain layers."""
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        model = Stack()
        lora_flax.quantize(model, NF4)
        before = model(X)
        lora_flax.wrap(model, LoraConfig(r=4, target_modules=["up_proj"], **options))
        np.testing.assert_allclose(model(X), before, rtol=1e-4, atol=1e-4)


def test_merging_a_quantised_base():
    model = Stack()
    lora_flax.quantize(model, NF4)
    lora_flax.wrap(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    expected = model(X)
    with pytest.raises(LoraError, match="dequantize"):
        lora_flax.merge(model)
    with pytest.raises(LoraError, match="dequantize"):
        lora_flax.merge_and_unload(model)
    np.testing.assert_array_equal(model(X), expected)
    lora_flax.dequantize(model)
    lora_flax.merge_and_unload(model)
    np.testing.assert_allclose(model(X), expected, rtol=1e-4, atol=1e-4)


def test_only_one_dequantised_weight_is_alive():
    """The step's memory beside its arguments does not grow by a layer's weight per layer."""

    def temporary(depth: int) -> int:
        width, hidden = 512, 2048
        model = Stack(width, hidden, depth)
        lora_flax.quantize(model, BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=()))
        lora_flax.wrap(model, LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
        trains = lora_flax.mark_only_lora_as_trainable(model)
        graphdef, adapter, rest = nnx.split(model, trains, ...)
        x = jnp.ones((4, width))
        step = jax.grad(lambda a, r: (nnx.merge(graphdef, a, r)(x) ** 2).sum())
        return jax.jit(step).lower(adapter, rest).compile().memory_analysis().temp_size_in_bytes

    layer = 4 * 512 * 2048  # bytes of one of the two kernels in float32
    assert temporary(12) - temporary(4) < layer


def test_the_compute_type():
    model = Stack()
    lora_flax.quantize(model, BitsAndBytesConfig(load_in_4bit=True,
                                                 bnb_4bit_compute_dtype="bfloat16"))  # fmt: skip
    layer = model.head
    x = X.astype(jnp.bfloat16)
    expected = (x @ layer.kernel[...].astype(jnp.bfloat16)).astype(jnp.float32) + jnp.arange(64.0)
    assert layer(X).dtype == jnp.float32
    np.testing.assert_array_equal(layer(X), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("config", [KINDS["nf4"], KINDS["int8"]])
def test_the_output_has_the_compute_dtype_of_the_layer(config, dtype):
    model = nnx.Dict(layer=nnx.Linear(64, 64, dtype=dtype, rngs=nnx.Rngs(0)))
    assert model.layer(X).dtype == dtype
    lora_flax.quantize(model, config)
    out = model.layer(X)
    assert out.dtype == dtype
    lora_flax.dequantize(model)
    np.testing.assert_array_equal(model.layer(X), out)


@pytest.mark.parametrize("skip", ["blocks.0.proj", "0.proj", "blocks.proj", "proj"])
def test_names_with_and_without_numbers_are_left_out(skip):
    blocks = [nnx.Dict(proj=nnx.Linear(64, 64, rngs=nnx.Rngs(0))) for _ in range(2)]
    model = nnx.Dict(blocks=nnx.List(blocks), out=nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=(skip,))
    lora_flax.quantize(model, config)
    quantized = [isinstance(block.proj, QuantizedDense) for block in model.blocks]
    assert quantized == [False, "0" in skip] and isinstance(model.out, QuantizedDense)


def test_what_is_left_out_and_what_cannot_be():
    model = Stack()
    skipping = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=("head", "up_proj"))
    lora_flax.quantize(model, skipping)
    kinds = [isinstance(m, QuantizedDense) for m in
             (model.layers.up_proj, model.layers.down_proj, model.head)]  # fmt: skip
    assert kinds == [False, True, False]
    with pytest.raises(LoraError, match="already quantized"):
        lora_flax.quantize(model, NF4)
    odd = Stack(64, 96)
    with pytest.raises(LoraError, match=r"layers.down_proj: .*multiple of 64 inputs, not 96"):
        lora_flax.quantize(odd, NF4)
    lora_flax.quantize(odd, KINDS["int8"])
    with pytest.raises(LoraError, match="no dense layer"):
        lora_flax.quantize(nnx.Embed(8, 64, rngs=nnx.Rngs(0)), NF4)
    for fields, said in (
        ({}, "one of load_in_4bit"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "one of load_in_4bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "nf4 or fp4"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype"),
    ):
        with pytest.raises(LoraError, match=said):
            BitsAndBytesConfig(**fields)


def test_a_refused_layer_leaves_the_model_unchanged():
    """The layer that cannot be quantized comes after ones that can."""
    model = Stack(64, 96)
    model.tail = Dense((64, 64), nnx.Rngs(0))
    model.tail.gain = nnx.Param(jnp.ones(64))
    before = [id(module) for _, module in nnx.iter_modules(model)]
    with pytest.raises(LoraError, match=r"down_proj.* not 96; tail has .*\['gain'\]") as refused:
        lora_flax.quantize(model, NF4)
    assert "llm_int8_skip_modules" in str(refused.value)
    assert [id(module) for _, module in nnx.iter_modules(model)] == before
    with pytest.raises(LoraError, match=r"arrays besides a kernel and a bias: \['gain'\]"):
        lora_flax.quantize(model, KINDS["int8"])
    assert [id(module) for _, module in nnx.iter_modules(model)] == before


def test_a_layer_in_a_tuple_leaves_the_model_unchanged():
    model = Stack()
    model.tail = nnx.data((Dense((64, 64), nnx.Rngs(0)),))
    with pytest.raises(LoraError, match=r"tail\.0 is in a tuple"):
        lora_flax.quantize(model, NF4)
    assert not [m for _, m in nnx.iter_modules(model) if isinstance(m, QuantizedDense)]
