"""A frozen dense layer plus its low-rank updates, in plain form or by one kernel.

The plain form computes the base's output and adds the update to it. `lora_flax.use_fused_lora`
makes a layer do both at once (`lora_flax.kernels.product`) wherever the kernel applies; elsewhere,
and for everything else, the plain form remains the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_flax.kernels.blocks import Platform
from lora_flax.kernels.lora import problem_of
from lora_flax.kernels.product import How, Operands, Shards, lora_matmul
from lora_flax.layers.adapter import Adapter, product
from lora_flax.layers.dropout import random_words
from lora_flax.layers.wrappers import LoRALayer

# Metadata of a stacked weight that the loop over its stack may pass whole, as a value with the
# attributes `stack` `[layer, in, out]` and `index`, which reads as the layer's own weight.
WHOLE_STACK = "whole_stack"
# With fewer rows, as in decoding, reading the weight takes longer than all else.
MIN_ROWS = 128


class LoRADense(LoRALayer):
    """`base(x) + ((dropout(x) @ A) @ B) * scale` for a layer with `kernel` `[*stack, in, out]`.

    A and B are float32 regardless of the base's dtype and are cast to `x.dtype` for the matmuls:
    this gives PEFT's float32 result in a float32 model, and no float32 activations in a bfloat16
    one.

    Attributes:
        platform, shards: where the fused kernel runs, and how the layer is cut on a mesh
            (`lora_flax.use_fused_lora`); by default it does not. Static.
    """

    def __init__(self, base: nnx.Module):
        super().__init__(base)
        self.platform: Platform | None = None
        self.shards: Shards | None = None

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None, **options: Any) -> jax.Array:
        """As `LoRALayer.__call__`."""
        if self.platform is None or options or not self._applies(x):
            return super().__call__(x, key=key, **options)
        (adapter,) = self.in_use
        _, (own_key,) = self._keys([adapter], key)
        rate, words = adapter.spec.config.lora_dropout, None
        if own_key is not None and rate:
            with jax.named_scope("lora/dropout"):
                words = random_words(own_key, x.shape[:-1])
        kernel: Any = self.kernel.get_value()
        # In a loop over a stack that is not sliced, the value says which layer it is.
        member = hasattr(kernel, "stack")
        weights, index = (kernel.stack, kernel.index) if member else (kernel[None], jnp.int32(0))
        with jax.named_scope("lora"):
            a, b, scale = joined_factors(adapter)
        y = lora_matmul(
            Operands(x, weights, index, a, b, scale, words), How(self.platform, self.shards, rate)
        )
        return y if self.bias is None else y + self.bias.astype(y.dtype)

    def fused_problem(self, shards: Shards | None, sizes: Mapping[str, int]) -> str:
        """Why the fused kernel cannot compute this layer; empty if it can.

        Args:
            shards: how the layer is cut on a mesh.
            sizes: sizes of the mesh's axes.
        """
        if type(self.kernel) is not nnx.Param or self.plain is not self.base:
            return "its weight is quantized or trained in full"
        arrays = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(self.base))}
        if not arrays <= {"kernel", "bias"}:
            return "it has arrays besides a kernel and a bias"
        adapters = self.in_use
        if len(adapters) != 1:
            return f"it has {len(adapters)} active adapters instead of 1"
        (adapter,) = adapters
        if adapter.lora_magnitude is not None or adapter.lora_bias is not None:
            return "its adapter has use_dora or lora_bias"
        inputs, outputs = self.kernel.shape[-2:]
        cut = Shards(()) if shards is None else shards
        parts = [math.prod(sizes[axis] for axis in axes) for axes in (cut.inputs, cut.outputs)]
        return problem_of((inputs, outputs), (parts[0], parts[1]), columns_of(adapter))

    def _applies(self, x: jax.Array) -> bool:
        """Whether this call can use the fused kernel."""
        if self.merged or self.probe is not None or self.rows is not None:
            return False
        if self.kernel.dtype != x.dtype or len(self.kernel.shape) != 2:
            return False
        if math.prod(x.shape[:-1]) < MIN_ROWS:
            return False
        sizes = dict(jax.sharding.get_abstract_mesh().shape)
        if self.shards is not None:
            over = [math.prod(sizes.get(axis, 1) for axis in axes) for axes in self.shards.rows]
            needed = {*sum(self.shards.rows, ()), *self.shards.inputs, *self.shards.outputs}
            whole = len(over) == x.ndim - 1 and needed <= sizes.keys()
            if not whole or any(n % by for n, by in zip(x.shape, over, strict=False)):
                return False
        return not self.fused_problem(self.shards, sizes)

    def _down(self, x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return product(x, a.astype(x.dtype))

    def _down_rows(self, x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.einsum("b...i,bir->b...r", x, a.astype(x.dtype))


def joined_factors(adapter: Adapter) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The whole update as one A `[in, R]`, one B `[R, features_out]`, and a scale for each of R.

    R counts the ranks of all slices, twice if a start is subtracted. Each slice's rows of B are
    zero outside its own columns.
    """
    spec = adapter.spec
    count, rank = len(spec.slices), spec.rank
    every_a, every_b, every_scale = [], [], []
    for sign, a, b in adapter.terms():
        every_a.append(a)
        every_scale.append(jnp.repeat(sign * adapter.scale[...], rank))
        if spec.is_whole:
            every_b.append(b)
            continue
        placed = jnp.zeros((count * rank, spec.features_out), b.dtype)
        for i, (part, columns) in enumerate(zip(spec.slices, adapter.split(b), strict=True)):
            placed = jax.lax.dynamic_update_slice(placed, columns, (i * rank, part.start))
        every_b.append(placed)
    return (
        jnp.concatenate(every_a, axis=-1),
        jnp.concatenate(every_b, axis=-2),
        jnp.concatenate(every_scale),
    )


def columns_of(adapter: Adapter) -> int:
    """R of `joined_factors`."""
    terms = 1 if adapter.start_A is None else 2
    return adapter.spec.rank * len(adapter.spec.slices) * terms
