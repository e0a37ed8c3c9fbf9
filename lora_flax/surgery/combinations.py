"""Combines several adapters into one: PEFT's `add_weighted_adapter` and its formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.index import ModelIndex
from lora_flax.layers.adapter import Adapter, Spec
from lora_flax.layers.wrappers import LoRAConv, LoRALayer
from lora_flax.surgery.named_adapters import refuse_merged, refuse_taken, refuse_unknown


def add_weighted_adapter(
    model: nnx.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: Literal["linear", "cat", "svd"] = "svd",
    svd_rank: int | None = None,
) -> None:
    """Creates an adapter as a weighted sum of others, with PEFT's formulas; stays inactive.

    Args:
        model: a wrapped model.
        adapters: names of the adapters to combine.
        weights: one per adapter; may be negative.
        adapter_name: name of the new adapter.
        combination_type: `cat` concatenates along the rank and is exact; `svd` is the best
            approximation of rank `svd_rank`; `linear` sums the As and the Bs, each times
            `sqrt(|weight| * scale)`, which requires equal ranks and is only approximate.
        svd_rank: defaults to the highest rank.

    Raises:
        LoraError: for unknown or already used names, mismatched lengths, incompatible ranks, or
            adapters that consist of more than A and B.
    """
    index = ModelIndex(model)
    refuse_merged(index)
    refuse_unknown(index, adapters)
    refuse_taken(index, adapter_name)
    if not adapters or len(adapters) != len(weights):
        raise LoraError(
            "combining adapters takes at least one adapter and one weight per adapter; got "
            f"{len(adapters)} adapters and {len(weights)} weights"
        )
    if combination_type not in _COMBINE:
        raise LoraError(f"combination_type must be linear, cat or svd, not {combination_type!r}")
    new = []
    for layer in index.wrappers.values():
        found = [
            (layer.adapters[name], weight)
            for name, weight in zip(adapters, weights, strict=True)
            if name in layer.adapters
        ]
        if found:
            _refuse_combining(layer, [adapter for adapter, _ in found])
            new.append((layer, _COMBINE[combination_type](found, svd_rank)))
    for layer, adapter in new:
        layer.adapters[adapter_name] = adapter


def _linear(found: list[tuple[Adapter, float]], svd_rank: int | None) -> Adapter:
    first = found[0][0]
    if any(adapter.spec.ranks != first.spec.ranks for adapter, _ in found):
        raise LoraError("combination_type linear needs adapters of equal rank; use cat or svd")
    a: Any = 0.0
    b: Any = 0.0
    for adapter, weight in found:
        # PEFT applies the square root of weight times scale to both, and the sign to A.
        root = jnp.sqrt(abs(weight) * adapter.scale[...])  # [*stack, slices]
        spec, sign = adapter.spec, 1.0 if weight >= 0 else -1.0
        a += sign * jnp.repeat(root, spec.rank, axis=-1)[..., None, :] * adapter.lora_A[...]
        sizes = np.array([part.size for part in spec.slices])
        columns = jnp.repeat(root, sizes, axis=-1, total_repeat_length=spec.width)
        b += columns[..., None, :] * adapter.lora_B[...]
    return _combined(first, first.spec.ranks, a, b)


def _cat(found: list[tuple[Adapter, float]], svd_rank: int | None) -> Adapter:
    first = found[0][0]
    count = len(first.spec.slices)
    a: list[list[jax.Array]] = [[] for _ in range(count)]
    b: list[list[jax.Array]] = [[] for _ in range(count)]
    for adapter, weight in found:
        for index in range(count):
            slice_a, slice_b = adapter.factors(index)
            a[index].append(weight * slice_a)
            b[index].append(slice_b)
    ranks = tuple(
        tuple(sum(adapter.spec.rank for adapter, _ in found) for _ in range(count))
        for _ in first.spec.ranks
    )
    parts = [jnp.concatenate(matrices, axis=-1) for matrices in a]
    rows = [jnp.concatenate(matrices, axis=-2) for matrices in b]
    return _combined(first, ranks, jnp.concatenate(parts, -1), jnp.concatenate(rows, -1))


def _svd(found: list[tuple[Adapter, float]], svd_rank: int | None) -> Adapter:
    first = found[0][0]
    rank = svd_rank or max(adapter.spec.rank for adapter, _ in found)
    a, b = [], []
    for index in range(len(first.spec.slices)):
        delta = sum(w * jnp.matmul(*adapter.factors(index)) for adapter, w in found)
        # PEFT's weight is [out, in]: U S belongs to the outputs and goes into B.
        u, s, vt = np.linalg.svd(np.swapaxes(np.asarray(delta), -1, -2), full_matrices=False)
        if rank > s.shape[-1]:
            raise LoraError(f"svd_rank {rank} exceeds the smaller side of a weight: {s.shape[-1]}")
        b.append(np.swapaxes(u[..., :rank] * s[..., None, :rank], -1, -2))
        a.append(np.swapaxes(vt[..., :rank, :], -1, -2))
    ranks = tuple((rank,) * len(row) for row in first.spec.ranks)
    return _combined(first, ranks, jnp.concatenate(a, -1), jnp.concatenate(b, -1))


_COMBINE = {"linear": _linear, "cat": _cat, "svd": _svd}


def _combined(first: Adapter, ranks: tuple[tuple[int, ...], ...], a: Any, b: Any) -> Adapter:
    """An adapter with the new arrays and alpha equal to the rank, so its scale is 1."""
    rank = max(max(row) for row in ranks)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=first.spec.config.target_modules)
    alphas = tuple(tuple(float(r or 1) for r in row) for row in ranks)
    spec = Spec(config, first.spec.slices, ranks, alphas, first.spec.features_out)
    stack = first.scale[...].shape[:-1]
    return Adapter(spec, stack, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))


def _refuse_combining(layer: LoRALayer, adapters: list[Adapter]) -> None:
    if isinstance(layer, LoRAConv):
        raise LoraError("adapters of convolutions cannot be combined")
    if any(adapter.spec.slices != adapters[0].spec.slices for adapter in adapters):
        raise LoraError("adapters of different slices of one layer cannot be combined")
    for adapter in adapters:
        if adapter.lora_magnitude is not None or adapter.lora_bias is not None:
            raise LoraError("adapters with use_dora or lora_bias cannot be combined")
