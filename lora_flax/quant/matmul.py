"""Multiplication with a quantized kernel, and its gradient."""

from __future__ import annotations

import functools

import jax

from lora_flax.kernels.blocks import Platform
from lora_flax.quant import encoding
from lora_flax.quant import pallas as fused
from lora_flax.quant.encoding import Encoded, Kind


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, encoded: Encoded, kind: Kind, platform: Platform | None) -> jax.Array:
    """`x @ kernel` `[..., O]`, in x's dtype.

    The backward pass dequantizes the kernel again: keeping every layer's kernel from the forward
    pass would hold the full model in x's dtype.

    Args:
        x: `[..., I]`.
        encoded: one kernel `[I, O]`; it has no gradient.
        kind: its kind.
        platform: multiplies with the fused kernel for that platform; None uses XLA.
    """
    if platform is None:
        return x @ encoding.dequantize(encoded, kind, x.dtype)
    out = fused.matmul(x.reshape(-1, x.shape[-1]), encoded, kind, platform)
    return out.reshape(*x.shape[:-1], -1)


def _forward(
    x: jax.Array, encoded: Encoded, kind: Kind, platform: Platform | None
) -> tuple[jax.Array, Encoded]:
    return matmul(x, encoded, kind, platform), encoded


def _backward(
    kind: Kind, platform: Platform | None, encoded: Encoded, gradient: jax.Array
) -> tuple[jax.Array, None]:
    if platform is None:
        return gradient @ encoding.dequantize(encoded, kind, gradient.dtype).T, None
    flat = gradient.reshape(-1, gradient.shape[-1])
    out = fused.matmul_transposed(flat, encoded, kind, platform)
    return out.reshape(*gradient.shape[:-1], -1), None


matmul.defvjp(_forward, _backward)
