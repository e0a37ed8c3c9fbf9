"""EVA (Paischer et al. 2024, arXiv:2410.07170): initializes A from a layer's input activations.

A starts as the principal components of the inputs that a layer sees on the data, and ranks are
assigned where they explain the most variance.

The components are computed by subspace iteration: each pass over the batches multiplies a basis Q
by the covariance of the inputs, `X^T (X Q)`, so a layer needs `[in, q]` instead of `[in, in]`. The
products come out of the model as a gradient: `observe` returns its input unchanged, and its
backward rule returns the statistics as the "gradient" of a variable. This works under scan, remat,
jit and on a mesh, without any support from the model.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.config import DEFAULT
from lora_flax.errors import LoraError
from lora_flax.index import Layer, ModelIndex
from lora_flax.init.activations import random_bases, sums_of_inputs
from lora_flax.init.weights import set_magnitude
from lora_flax.layers.adapter import Adapter, Spec
from lora_flax.layers.dense import LoRADense
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.summary import Report, report_on

PASSES = 6


@dataclasses.dataclass(frozen=True)
class _Components:
    """Principal components of one member of a layer.

    Attributes:
        directions: `[in, q]`, most variance first.
        variances: `[q]`.
        total: the total variance.
        count: the number of inputs.
    """

    directions: np.ndarray
    variances: np.ndarray
    total: float
    count: float


def initialize_lora_eva_weights(
    model: nnx.Module,
    batches: Sequence[Any],
    forward: Callable[[nnx.Module, Any], jax.Array],
    mask: Callable[[Any], jax.Array] | None = None,
    *,
    rho: float = 2.0,
    whiten: bool = False,
    adjust_scaling_factors: bool = True,
    adapter_name: str = DEFAULT,
) -> Report:
    """Sets A from data, like PEFT's `initialize_lora_eva_weights`.

    B is zero, so outputs do not change.

    Args:
        model: wrapped, with `init_lora_weights="eva"`.
        batches: inputs to `forward`; iterated over several times.
        forward: runs the model on a batch, using every wrapped layer, and returns an array.
        mask: maps a batch to a bool array `[B, S]` of the positions that count; defaults to all.
        rho: no layer gets more than `rho` times its rank; 1 leaves ranks unchanged.
        whiten: divide each component by the square root of its singular value, as PEFT does.
        adjust_scaling_factors: keep `alpha / r` constant when ranks change.
        adapter_name: which adapter.

    Returns:
        What is wrapped, with the new ranks. A layer of rank 0 has no update.

    Raises:
        LoraError: if the model has no such adapter, there are no batches, or rho is below 1.
    """
    index = ModelIndex(model)
    layers = [layer for layer in index.layers if layer.adapter(adapter_name) is not None]
    if not layers or any(layer.wrapper is not LoRADense for layer in layers):
        raise LoraError(f"EVA needs an adapter {adapter_name!r} on dense layers only")
    if not batches or rho < 1:
        raise LoraError("EVA needs at least one batch and rho of at least 1")
    specs = [_adapter(layer, adapter_name).spec for layer in layers]
    widths = [round(spec.rank * rho) for spec in specs]
    found = _components(model, layers, widths, batches, forward, mask)
    ranks = _distribute(specs, found, rho)
    for layer, spec, components, new in zip(layers, specs, found, ranks, strict=True):
        adapter = _start(layer, spec, components, new, whiten, adjust_scaling_factors)
        assert isinstance(layer.module, LoRALayer)
        layer.module.adapters[adapter_name] = adapter
    return report_on(index)


def _components(
    model: nnx.Module,
    layers: list[Layer],
    widths: list[int],
    batches: Iterable[Any],
    forward: Callable[[nnx.Module, Any], jax.Array],
    mask: Callable[[Any], jax.Array] | None,
) -> list[list[_Components]]:
    """The components of each layer, member by member."""
    # Like torch's svd_lowrank in PEFT: twice as many directions as needed.
    bases = random_bases(layers, [2 * width for width in widths])
    results: list[list[_Components]] = []
    for turn in range(PASSES):
        sums = sums_of_inputs(model, layers, bases, batches, forward, mask)
        results = []
        for index, total in enumerate(sums):
            members = total.reshape(-1, *total.shape[-2:])
            basis = bases[index].reshape(-1, *bases[index].shape[-2:])
            found = [_rayleigh_ritz(q, s) for q, s in zip(basis, members, strict=True)]
            results.append(found)
            if turn < PASSES - 1:
                ahead = [_times_covariance(q, s) for q, s in zip(basis, members, strict=True)]
                bases[index] = np.linalg.qr(np.stack(ahead))[0].reshape(bases[index].shape)
    return results


def _times_covariance(basis: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """`C Q` for the covariance C `= X^T X / n - m m^T`."""
    count, mean = sums[0, -1], sums[:, -3] / sums[0, -1]
    product: np.ndarray = sums[:, :-3] / count - np.outer(mean, mean @ basis)
    return product


def _rayleigh_ritz(basis: np.ndarray, sums: np.ndarray) -> _Components:
    """The best directions within the span of the basis, largest variance first."""
    small = basis.T @ _times_covariance(basis, sums)
    variances, vectors = np.linalg.eigh((small + small.T) / 2)
    order = np.argsort(variances)[::-1]
    count, mean = sums[0, -1], sums[:, -3] / sums[0, -1]
    total = float(sums[:, -2].sum() / count - mean @ mean)
    return _Components(basis @ vectors[:, order], np.maximum(variances[order], 0), total, count)


def _distribute(
    specs: list[Spec], found: list[list[_Components]], rho: float
) -> list[tuple[tuple[int, ...], ...]]:
    """Each layer's ranks `[member][slice]`: the budget goes where it explains the most variance."""
    shares, keys, budget = [], [], 0
    for index, (spec, members) in enumerate(zip(specs, found, strict=True)):
        for member, parts in enumerate(members):
            for part, rank in enumerate(spec.ranks[member]):
                budget += rank
                top = parts.variances[: min(round(rank * rho), _largest(spec, part, parts))]
                shares += list(top / parts.total)
                keys += [(index, member, part)] * len(top)
    best = np.argsort(-np.array(shares), kind="stable")[:budget]
    counts = collections.Counter(keys[i] for i in best)
    return [
        tuple(
            tuple(counts[index, member, part] for part in range(len(spec.slices)))
            for member in range(len(spec.ranks))
        )
        for index, spec in enumerate(specs)
    ]


def _largest(spec: Spec, part: int, components: _Components) -> int:
    return min(len(components.variances), spec.slices[part].size)


def _start(
    layer: Layer,
    spec: Spec,
    components: list[_Components],
    ranks: tuple[tuple[int, ...], ...],
    whiten: bool,
    adjust: bool,
) -> Adapter:
    """An adapter with the new ranks and A set to the components."""
    alphas = tuple(
        tuple(
            alpha * new / old if adjust and new and old else alpha
            for alpha, new, old in zip(*rows, strict=True)
        )
        for rows in zip(spec.alphas, ranks, spec.ranks, strict=True)
    )
    spec = dataclasses.replace(spec, ranks=ranks, alphas=alphas)
    width = max(spec.rank, 1)
    a = np.zeros((len(ranks), layer.features_in, len(spec.slices) * width), np.float32)
    for member, row in enumerate(ranks):
        for part, rank in enumerate(row):
            directions = components[member].directions[:, :rank]
            if whiten:
                # PEFT's singular values are those of the centered inputs.
                values = np.sqrt(components[member].variances[:rank] * components[member].count)
                directions = directions / np.sqrt(values)
            a[member, :, part * width : part * width + rank] = directions
    shape = (*layer.stack, *a.shape[1:])
    b = jnp.zeros((*layer.stack, width, spec.width), jnp.float32)
    adapter = Adapter(spec, layer.stack, jnp.asarray(a.reshape(shape)), b)
    if spec.config.use_dora:
        assert isinstance(layer.module, LoRALayer)
        set_magnitude(adapter, layer.module.weight)
    return adapter


def _adapter(layer: Layer, name: str) -> Adapter:
    adapter = layer.adapter(name)
    assert adapter is not None
    return adapter
