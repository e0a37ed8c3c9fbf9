"""QuantizedArray: bitsandbytes' codes, scales and values; a pytree as any other."""

from __future__ import annotations

import json

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lora_flax import LoraError, QuantizedArray

# Kind, double quantization, and bits per weight.
KINDS = [("nf4", False, 4.5), ("nf4", True, 4.127), ("fp4", True, 4.127), ("int8", False, 8.01)]
each_kind = pytest.mark.parametrize(("kind", "double"), [kind[:2] for kind in KINDS])
quantize = jax.jit(QuantizedArray.quantize, static_argnums=(1, 2))


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[out, in]`, a row of zeros and an outlier in it."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    values[1] = 0
    values[2, 3] = 3.0
    return values.to(dtype)


def packed_by_bitsandbytes(w: torch.Tensor, kind: str, double: bool):
    """Codes, the arrays saved with them, and the dequantized weight."""
    codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type=kind)
    parts = {name: array.numpy() for name, array in state.as_dict(packed=True).items()}
    return codes.numpy(), parts, bnb.dequantize_4bit(codes, state)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 64), (960, 576)])
def test_codes_and_values_are_bitsandbytes(kind, double, dtype, shape):
    w = weight(shape, dtype)
    codes, parts, dequantized = packed_by_bitsandbytes(w, kind, double)
    kernel = jnp.asarray(w.float().numpy().T, w.dtype == torch.bfloat16 and jnp.bfloat16 or None)
    expected = QuantizedArray.from_bitsandbytes(codes, parts, kernel.dtype)
    found = quantize(kernel, kind, double)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.absmax, expected.absmax)
    if double:
        # The mean of the scales is summed in another order than torch's.
        for name in ("offset", "nested_absmax"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)
    values = expected.dequantize()
    assert values.dtype == kernel.dtype
    np.testing.assert_array_equal(
        np.asarray(values, np.float32), dequantized.float().numpy().reshape(shape).T
    )


def test_int8_is_bitsandbytes():
    w = weight((96, 64), torch.float16)
    codes, absmax, _ = bnb.int8_vectorwise_quant(w)
    found = quantize(jnp.asarray(w.numpy().T), "int8")
    np.testing.assert_array_equal(found.codes, codes.numpy().T)
    np.testing.assert_array_equal(found.absmax[0], absmax.numpy())
    expected = torch.ops.bitsandbytes.int8_vectorwise_dequant.default(codes, absmax)
    np.testing.assert_array_equal(found.dequantize(jnp.float32), expected.numpy().T)


@pytest.mark.parametrize(("kind", "double", "bits"), KINDS)
def test_bits_per_weight(kind, double, bits):
    shape = (3072, 8192)
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = jax.eval_shape(lambda k: QuantizedArray.quantize(k, kind, double), kernel)
    size = sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    assert size / np.prod(shape) == pytest.approx(bits, abs=0.005)


@each_kind
def test_a_stack_is_its_members(kind, double):
    """Quantized, indexed, scanned, mapped and dequantized: the same as one kernel at a time."""
    kernels = jax.random.normal(jax.random.key(0), (2, 3, 128, 64))
    stack = QuantizedArray.quantize(kernels, kind, double)
    assert (stack.shape, stack.ndim, stack.double) == ((2, 3, 128, 64), 4, double)
    x = jax.random.normal(jax.random.key(1), (5, 128))
    alone = quantize(kernels[1, 2], kind, double)
    member = stack[1, 2]
    assert jax.tree.structure(member) == jax.tree.structure(alone)
    jax.tree.map(np.testing.assert_array_equal, member, alone)
    assert stack[1].shape == (3, 128, 64) and member.shape == (128, 64)
    np.testing.assert_array_equal(stack.dequantize()[1, 2], alone.dequantize())

    expected = member.matmul(x)
    np.testing.assert_allclose(expected, x @ alone.dequantize(), rtol=1e-5, atol=1e-5)
    _, scanned = jax.lax.scan(lambda _, kernel: (None, kernel.matmul(x)), None, stack[1])
    mapped = jax.vmap(jax.vmap(lambda kernel: kernel.matmul(x)))(stack)
    np.testing.assert_allclose(scanned[2], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mapped[1, 2], expected, rtol=1e-5, atol=1e-5)


@each_kind
def test_only_the_input_has_a_gradient(kind, double):
    kernel = QuantizedArray.quantize(jax.random.normal(jax.random.key(0), (64, 32)), kind, double)
    x, d_out = (jax.random.normal(jax.random.key(i), (5, size)) for i, size in ((1, 64), (2, 32)))
    gradient = jax.jit(jax.grad(lambda x, kernel: (kernel.matmul(x) * d_out).sum()))(x, kernel)
    np.testing.assert_allclose(gradient, d_out @ kernel.dequantize().T, rtol=1e-5, atol=1e-5)


def test_it_can_be_donated_and_compiles_once_per_kind():
    compiled = 0

    def run(array):
        nonlocal compiled
        compiled += 1
        return jax.tree.map(lambda leaf: leaf + 1, array)

    run = jax.jit(run, donate_argnums=0)
    kernel = jnp.ones((64, 32))
    for kind, double, times in (("nf4", True, 1), ("nf4", True, 1), ("nf4", False, 2)):
        array = QuantizedArray.quantize(kernel, kind, double)
        run(array)
        assert array.codes.is_deleted() and compiled == times


def test_states_that_do_not_fit():
    codes, parts, _ = packed_by_bitsandbytes(weight((96, 64)), "nf4", True)
    name = "quant_state.bitsandbytes__nf4"
    settings = json.loads(parts[name].tobytes())

    def changed(**fields) -> dict[str, np.ndarray]:
        return parts | {name: np.frombuffer(json.dumps(settings | fields).encode(), np.uint8)}

    for state, said in (
        (parts | {name: np.frombuffer(b"{", np.uint8)}, "is damaged"),
        (changed(blocksize=128), "block sizes"),
        (changed(shape=[7, 64]), "scales do not match"),
        (changed(shape=[48, 64]), "have the shapes"),
        (parts | {"nested_absmax": np.zeros(7, np.float32)}, "have the shapes"),
        ({"absmax": parts["absmax"]}, "expected exactly one of"),
        (parts | {"zero_point": parts["absmax"]}, "unexpected arrays .*: zero_point"),
    ):
        with pytest.raises(LoraError, match=said):
            QuantizedArray.from_bitsandbytes(codes, state, jnp.float32)
    with pytest.raises(LoraError, match="multiple of 64 inputs, not 96"):
        QuantizedArray.quantize(jnp.ones((96, 64)), "nf4")
