"""The arrays of one adapter on one layer, and what they mean.

Every layer's weight is treated as a single matrix `[in, out]`: a dense kernel unchanged, an
embedding as `[num_embeddings, features]`, and a convolution kernel with its window and input
channels flattened. An update of rank r is `A [in, r] @ B [r, out]`, times a scale.

Ranks may differ between the layers of a stack and between the slices of a fused projection. A and B
are then sized for the largest rank and zero-padded. The padding stays zero without a mask: if a
column of A and the matching row of B are both zero, so are both gradients, and no optimizer moves a
zero whose gradient is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.config import LoraConfig, scaling


class LoRAScale(nnx.Variable[Any]):
    """The scale factor of an update, float32; never trained."""


class LoRAStart(nnx.Variable[Any]):
    """Initial values of A and B, subtracted if their product is nonzero; never trained."""


@dataclass(frozen=True)
class Slice:
    """Columns `[start, start + size)` of a layer's output; an empty name means all of them."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Spec:
    """What an adapter does to one layer, or to each layer of a stack (a "member").

    Attributes:
        config: the adapter's config.
        slices: the columns that have an update, in order, each with its own A and B.
        ranks: `[member][slice]`; 0 for a member or slice without an update.
        alphas: `[member][slice]`.
        features_out: number of columns of the layer.
    """

    config: LoraConfig
    slices: tuple[Slice, ...]
    ranks: tuple[tuple[int, ...], ...]
    alphas: tuple[tuple[float, ...], ...]
    features_out: int

    @property
    def rank(self) -> int:
        """The rank that A and B have room for in one slice."""
        return max(max(row) for row in self.ranks)

    @property
    def width(self) -> int:
        """Number of columns of B, over all slices."""
        return sum(part.size for part in self.slices)

    @property
    def is_whole(self) -> bool:
        """Whether there is a single slice that covers the entire output."""
        return self.width == self.features_out and len(self.slices) == 1

    def scales(self) -> np.ndarray:
        """float32 `[member, slice]`."""
        rslora = self.config.use_rslora
        rows = zip(self.alphas, self.ranks, strict=True)
        return np.array(
            [[scaling(a, r, rslora) for a, r in zip(*row, strict=True)] for row in rows], np.float32
        )

    def columns(self, index: int) -> slice:
        """The columns of B that belong to slice `index`."""
        before = sum(part.size for part in self.slices[:index])
        return slice(before, before + self.slices[index].size)


class Adapter(nnx.Module):
    """The arrays of one adapter on one layer; `*stack` is empty for a single layer.

    Attributes:
        lora_A: `[*stack, in, slices * rank]`, or `[*stack, *window, in, rank]` for a convolution.
        lora_B: `[*stack, rank, width]`.
        lora_bias: `[*stack, width]`, or None.
        lora_magnitude: `[*stack, width]`, the norms that DoRA learns, or None.
        scale: `[*stack, slices]`.
        start_A, start_B: same shapes as lora_A and lora_B, or None.
        spec: static.
    """

    def __init__(self, spec: Spec, stack: tuple[int, ...], a: jax.Array, b: jax.Array):
        self.spec = spec
        self.lora_A = nnx.LoRAParam(a)
        self.lora_B = nnx.LoRAParam(b)
        self.lora_bias: nnx.LoRAParam[Any] | None = nnx.data(None)
        if spec.config.lora_bias:
            self.lora_bias = nnx.LoRAParam(jnp.zeros((*stack, spec.width), jnp.float32))
        self.lora_magnitude: nnx.LoRAParam[Any] | None = nnx.data(None)
        self.start_A: LoRAStart | None = nnx.data(None)
        self.start_B: LoRAStart | None = nnx.data(None)
        self.scale = LoRAScale(jnp.asarray(spec.scales().reshape(*stack, len(spec.slices))))

    def factors(self, index: int) -> tuple[jax.Array, jax.Array]:
        """Slice `index` of the update as `[..., in, R]` and `[..., R, size]`, float32.

        The second factor includes the scale. If a start is subtracted, R is twice the rank.
        """
        rank, columns = self.spec.rank, self.spec.columns(index)
        scale = self.scale[..., index, None, None]
        a, b = [], []
        for sign, lora_a, lora_b in self.terms():
            matrix = as_matrix(lora_a, self.scale[...].ndim - 1)
            a.append(matrix[..., index * rank : (index + 1) * rank])
            b.append(sign * scale * lora_b[..., columns])
        return jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=-2)

    def terms(self) -> list[tuple[int, jax.Array, jax.Array]]:
        """The update as a sum of products: the sign, A and B of each term."""
        terms = [(1, self.lora_A[...], self.lora_B[...])]
        if self.start_A is not None and self.start_B is not None:
            terms.append((-1, self.start_A[...], self.start_B[...]))
        return terms

    def spread(self, parts: list[jax.Array]) -> jax.Array:
        """Moves each slice's columns `[..., size]` into place in `[..., features_out]`."""
        if self.spec.is_whole:
            return parts[0]
        pieces, at = [], 0
        for part, value in zip(self.spec.slices, parts, strict=True):
            pieces += [jnp.zeros((*value.shape[:-1], part.start - at), value.dtype), value]
            at = part.start + part.size
        end = jnp.zeros((*parts[0].shape[:-1], self.spec.features_out - at), parts[0].dtype)
        return jnp.concatenate([*pieces, end], axis=-1)

    def split(self, values: jax.Array) -> list[jax.Array]:
        """Splits `[..., width]` into the columns of each slice."""
        return [values[..., self.spec.columns(i)] for i in range(len(self.spec.slices))]

    def delta(self) -> jax.Array:
        """The full update including the scale, float32 `[..., in, features_out]`."""
        # By default TPUs and GPUs multiply float32 at reduced precision; a merged weight is
        # computed once and kept, so it gets full precision.
        return self.spread(
            [
                jnp.matmul(*self.factors(index), precision="highest")
                for index in range(len(self.spec.slices))
            ]
        )


def as_matrix(kernel: jax.Array, stack: int) -> jax.Array:
    """Reshapes a kernel `[*stack, ..., out]` to `[*stack, in, out]`."""
    return kernel.reshape(*kernel.shape[:stack], -1, kernel.shape[-1])


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix` for `x` `[..., in]` and a `matrix` `[in, out]` that may be trained.

    On one device, the leading axes are joined. The gradient of the matrix then sums over one axis;
    for a sum over several, XLA's CPU backend first writes a transposed copy of the output's
    gradient. With several devices the axes stay separate, as they may be sharded.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return x @ matrix
    flat = x.reshape(-1, x.shape[-1])
    if matrix.shape[0] > matrix.shape[1]:
        y: jax.Array = jax.lax.platform_dependent(
            flat, matrix, cpu=_narrow_product, default=jnp.matmul
        )
    else:
        y = flat @ matrix
    return y.reshape(*x.shape[:-1], matrix.shape[-1])


def _narrow_product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix`, with the gradient of `matrix` computed as `[out, in]`.

    XLA's CPU backend takes five times as long for a product whose result is tall and narrow; the
    barrier keeps it from undoing the transpositions.
    """
    wide: jax.Array = jax.lax.optimization_barrier(matrix.T)  # [out, in]
    return x @ wide.T
