"""One pass over the data with a `Probe` on selected layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.host import on_host
from lora_flax.index import Layer
from lora_flax.layers.probe import Probe, ProbeStats, ProbeWeights
from lora_flax.layers.wrappers import LoRALayer

State = nnx.State[Any, Any]


def random_bases(layers: list[Layer], widths: list[int]) -> list[np.ndarray]:
    """Random orthonormal directions for each layer, `[*stack, in, q]`; q is at most `in`."""
    bases = []
    for index, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        shape = (*layer.stack, layer.features_in, min(width, layer.features_in))
        bases.append(np.linalg.qr(np.asarray(jax.random.normal(jax.random.key(index), shape)))[0])
    return bases


def sums_of_inputs(
    model: nnx.Module,
    layers: list[Layer],
    bases: list[np.ndarray],
    batches: Iterable[Any],
    forward: Callable[[nnx.Module, Any], jax.Array],
    mask: Callable[[Any], jax.Array] | None,
) -> list[np.ndarray]:
    """Each layer's `Probe` sums over the batches, float64 `[*stack, in, q + 3]`.

    Args:
        model: a wrapped model.
        layers: wrapped layers of the model.
        bases: `[*stack, in, q]` for each layer, see `Probe`.
        batches: inputs to `forward`.
        forward: runs the model on a batch and must use every one of the layers.
        mask: maps a batch to a bool array `[B, S]` of the positions that count; defaults to all.
    """
    wrappers = [layer.module for layer in layers if isinstance(layer.module, LoRALayer)]
    for wrapper, basis in zip(wrappers, bases, strict=True):
        wrapper.probe = Probe(jnp.asarray(basis))
    try:
        graphdef, *states = nnx.split(model, ProbeStats, ProbeWeights, ...)
        stats, weights, rest = states

        @jax.jit
        def gather(stats: State, rest: State, batch: Any, counts: jax.Array) -> State:
            def spread(leaf: jax.Array) -> jax.Array:
                return jnp.broadcast_to(counts, (*leaf.shape, *counts.shape))

            spread_weights = jax.tree.map(spread, weights)

            def run(stats: State) -> jax.Array:
                whole = nnx.merge(graphdef, stats, spread_weights, rest)
                return jnp.sum(forward(whole, batch).astype(jnp.float32))

            sums: State = jax.grad(run)(stats)
            return sums

        total = None
        for batch in batches:
            counts = jnp.asarray(1.0 if mask is None else mask(batch), jnp.float32)
            part = gather(stats, rest, batch, counts)
            part = jax.tree.map(lambda leaf: on_host(leaf).astype(np.float64), part)
            total = part if total is None else jax.tree.map(np.add, total, part)
        return _in_order(model, layers, total)
    finally:
        for wrapper in wrappers:
            wrapper.probe = nnx.data(None)


def _in_order(model: nnx.Module, layers: list[Layer], total: Any) -> list[np.ndarray]:
    by_path = {path[:-2]: leaf.get_value() for path, leaf in nnx.to_flat_state(total)}
    return [by_path[layer.path] for layer in layers]
