"""QERA (Zhang et al. 2025, arXiv:2410.06040): minimizes the output error from quantization.

A B starts as the part of the quantization error that affects the layer's outputs the most.

Of all products of rank r, the one that minimizes the expected error of the output, `E |x (W - Q - A
B)|^2 = |R^(1/2) (W - Q - A B)|^2` with `R = E x^T x`, projects the error D = W - Q onto the leading
right singular vectors V of `R^(1/2) D`: `A B = D V V^T`. This is QERA-exact without inverting the
square root of R. LoftQ is the special case where R is the identity; the inputs of language models
are far from that, so the same rank corrects several times as much of the error.

R is `[in, in]`, too large to store for each layer. What is stored is its action on q directions,
from which it is reconstructed on their span (Nystrom's method), and its diagonal, which gives the
rest: one pass over the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from lora_flax.config import DEFAULT
from lora_flax.errors import LoraError
from lora_flax.init.activations import random_bases, sums_of_inputs
from lora_flax.init.residual import ReadWeight, balanced, quantized_layers, start_from_residual

# Number of directions that R is projected onto.
DIRECTIONS = 64
# Power iterations for V, on twice as many vectors as needed.
ITERATIONS = 8


def initialize_lora_qera_weights(
    model: nnx.Module,
    read: ReadWeight,
    batches: Sequence[Any],
    forward: Callable[[nnx.Module, Any], jax.Array],
    mask: Callable[[Any], jax.Array] | None = None,
    adapter_name: str = DEFAULT,
) -> None:
    """Sets A and B so that outputs of `Q + A B scale` are as close to the weight's as r allows.

    The base is still the plain quantization of the checkpoint, so the adapter fits any copy of it.

    Args:
        model: quantized and wrapped, with `init_lora_weights="qera"`.
        read: returns a layer's weight `[in, out]` from before quantization, given its PyTorch name,
            such as `model.layers.0.mlp.down_proj`.
        batches: inputs to `forward`; iterated over once.
        forward: runs the model on a batch, using every wrapped layer, and returns an array.
        mask: maps a batch to a bool array `[B, S]` of the positions that count; defaults to all.
        adapter_name: which adapter.

    Raises:
        LoraError: if no quantized layer has such an adapter, or there are no batches.
    """
    layers = quantized_layers(model, adapter_name)
    if not batches:
        raise LoraError("QERA needs at least one batch")
    bases = random_bases(layers, [DIRECTIONS] * len(layers))
    sums = sums_of_inputs(model, layers, bases, batches, forward, mask)
    for layer, basis, total in zip(layers, bases, sums, strict=True):
        members = math.prod(layer.stack)
        moments = [
            _Moments(q, s)
            for q, s in zip(
                basis.reshape(members, *basis.shape[-2:]),
                total.reshape(members, *total.shape[-2:]),
                strict=True,
            )
        ]

        def factors(
            member: int, residual: np.ndarray, rank: int, moments: list[_Moments] = moments
        ) -> tuple[np.ndarray, np.ndarray]:
            return moments[member].factors(residual, rank)

        start_from_residual(layer, read, adapter_name, factors)


class _Moments:
    """R of one layer's inputs, up to a constant factor: `low low^T + diag(rest)`.

    Args:
        basis: Q `[in, q]`.
        sums: `Probe` sums along Q, `[in, q + 3]`.
    """

    def __init__(self, basis: np.ndarray, sums: np.ndarray):
        seen, diagonal = sums[:, :-3], sums[:, -2]  # R Q, diag(R)
        small = basis.T @ seen
        values, vectors = np.linalg.eigh((small + small.T) / 2)
        sound = values > 1e-10 * max(values[-1], 1e-30)
        low = seen @ (vectors[:, sound] / np.sqrt(values[sound]))
        self.low = low.astype(np.float32)
        self.rest = np.maximum(diagonal - (low**2).sum(axis=1), 0).astype(np.float32)[:, None]

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        product: np.ndarray = self.low @ (self.low.T @ x) + self.rest * x
        return product

    def factors(self, residual: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """`D V` and `V^T` for D `[in, out]`, with their magnitudes balanced."""
        width = min(2 * rank, *residual.shape)
        v = np.random.default_rng(0).standard_normal((residual.shape[1], width), np.float32)
        for _ in range(ITERATIONS):
            v = np.linalg.qr(residual.T @ (self @ (residual @ v)))[0]
        seen = residual @ v  # [in, width]
        _, vectors = np.linalg.eigh(seen.T @ (self @ seen))
        v = v @ vectors[:, ::-1][:, :rank]
        u, sizes, wt = np.linalg.svd(residual @ v, full_matrices=False)
        return balanced(u, sizes, wt @ v.T)
