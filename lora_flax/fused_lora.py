"""Switches dense layers with LoRA to the fused kernels, where these apply or are faster."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_flax.errors import LoraError, at_most_ten
from lora_flax.index import Layer, ModelIndex
from lora_flax.kernels.blocks import Platform
from lora_flax.kernels.product import How, Operands, Shards, lora_matmul
from lora_flax.kernels.timing import MatmulChoice, compare
from lora_flax.layers.dense import WHOLE_STACK, LoRADense, columns_of
from lora_flax.layers.dropout import drop, random_words
from lora_flax.targets.naming import Path

# From a layer's path and the shape of its weight to how a mesh cuts it.
ShardsOf = Callable[[Path, tuple[int, ...]], Shards]


def use_fused_lora(
    model: nnx.Module,
    platform: Platform,
    shards_of: ShardsOf | None = None,
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Makes dense layers multiply and add their update in one kernel, in place.

    Those whose shape, weight or adapter the kernel does not support keep the plain form, and so do
    inputs of few rows, mixed batches and merged weights.

    The weights of a stack get the metadata `lora_flax.layers.dense.WHOLE_STACK`, with which a loop
    over the stack may pass them whole: the kernel reads a layer's blocks out of the stack, while
    for a slice of it XLA first writes a copy.

    Args:
        model: wrapped.
        platform: `tpu`, or `tpu_interpreted` for tests.
        shards_of: how each layer is cut on the mesh that the model runs on; None for one device.
        sizes: sizes of that mesh's axes.

    Raises:
        LoraError: if the kernel supports none of the layers, with the reasons.
    """
    layers, problems = _layers(ModelIndex(model), shards_of, sizes or {})
    if not layers:
        why = "; ".join(at_most_ten(problems)) or "the model has no dense layers with LoRA"
        raise LoraError(f"no layer can use the fused LoRA kernel: {why}; use the plain form (xla)")
    for layer, shards in layers:
        module: Any = layer.module
        module.platform, module.shards = platform, shards
        whole = bool(layer.stack) and not (shards and shards.gathered)
        module.kernel.set_metadata(WHOLE_STACK, whole)


def time_fused_lora(
    model: nnx.Module,
    platform: Platform,
    rows: int,
    dtype: Any,
    shards_of: ShardsOf | None = None,
    sizes: Mapping[str, int] | None = None,
    compiler_options: Mapping[str, str] | None = None,
) -> MatmulChoice | None:
    """Times both forms on the largest layer, with gradients, and leaves the model as it is.

    On a mesh, one device's part of the layer is timed, on this process's first device and without
    communication, which is the same for both.

    Args:
        model: wrapped.
        platform: the platform it runs on.
        rows: rows of the inputs on one device: all axes but the last.
        dtype: dtype of the inputs.
        shards_of: as for `use_fused_lora`.
        sizes: sizes of the mesh's axes.
        compiler_options: those that the model's own step is compiled with.

    Returns:
        The timings; None if the kernel supports no layer.
    """
    sizes = sizes or {}
    layers, _ = _layers(ModelIndex(model), shards_of, sizes)
    if not layers:
        return None
    layer, shards = max(layers, key=lambda found: math.prod(found[0].kernel))
    cut = shards or Shards(())
    inputs, outputs = (
        size // math.prod(sizes[axis] for axis in axes)
        for size, axes in zip(layer.kernel, (cut.inputs, cut.outputs), strict=True)
    )
    module: Any = layer.module
    (adapter,) = module.in_use
    rank, rate = columns_of(adapter), adapter.spec.config.lora_dropout
    operands = Operands(
        x=jnp.ones((rows, inputs), dtype),
        weights=jnp.ones((1, inputs, outputs), dtype),
        layer=jnp.int32(0),
        a=jnp.ones((inputs, rank)),
        b=jnp.ones((rank, outputs)),
        scale=jnp.ones(rank),
        words=random_words(jax.random.key(0), (rows,)) if rate else None,
    )
    fused = functools.partial(lora_matmul, how=How(platform, None, rate))
    ways = {"xla": functools.partial(plain_matmul, rate=rate), "pallas": fused}
    timed = {name: _with_gradients(run) for name, run in ways.items()}
    return compare("LoRA matmul", rows, timed, operands, compiler_options=compiler_options)


def _layers(
    index: ModelIndex, shards_of: ShardsOf | None, sizes: Mapping[str, int]
) -> tuple[list[tuple[Layer, Shards | None]], list[str]]:
    """The layers that the kernel supports, and why it does not support the others."""
    found, problems = [], []
    for layer in index.layers:
        if not isinstance(layer.module, LoRADense):
            continue
        shards = None if shards_of is None else shards_of(layer.path, layer.kernel)
        problem = layer.module.fused_problem(shards, sizes)
        if len(layer.stack) > 1:
            problem = problem or "it is in a stack of stacks"
        if problem:
            problems.append(f"{layer.name}: {problem}")
        else:
            found.append((layer, shards))
    return found, problems


def plain_matmul(operands: Operands, rate: float) -> jax.Array:
    """What XLA computes for a layer in plain form: the reference of `lora_matmul`."""
    x, weights, layer, a, b, scale, words = operands
    narrow = (x if words is None else drop(x, words, rate)) @ a.astype(x.dtype)
    h = (narrow.astype(jnp.float32) * scale).astype(x.dtype)
    y: jax.Array = x @ weights[layer] + h @ b.astype(x.dtype)
    return y


def _with_gradients(run: Callable[[Operands], jax.Array]) -> Callable[[Operands], Any]:
    def both(operands: Operands) -> Any:
        def of(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return run(operands._replace(x=x, a=a, b=b))

        y, pull = jax.vjp(of, operands.x, operands.a, operands.b)
        return y, pull(y)

    return both
