"""Combines several adapters into one: PEFT's `add_weighted_adapter` and its formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.errors import LoraError
from lora_flax.index import ModelIndex
from lora_flax.layers.adapter import Adapter, Spec
from lora_flax.layers.wrappers import LoRAConv, LoRALayer
from lora_flax.surgery.named_adapters import refuse_merged, refuse_taken, refuse_unknown
from lora_flax.targets.naming import dotted


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
        svd_rank: defaults to the highest rank. Adapters with the pissa and olora starts have twice
            their `r`, since their start is subtracted.

    The new adapter has the config of the first one, with its own ranks and a scale of 1.

    Raises:
        LoraError: for unknown or already used names, mismatched lengths, incompatible ranks, a
            `linear` combination of a start that is subtracted, or adapters that consist of more
            than A and B (DoRA, trained biases, modules_to_save, trainable tokens).
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
    if svd_rank is not None and svd_rank < 1:
        raise LoraError(f"svd_rank must be at least 1, not {svd_rank}")
    _refuse_trained_whole(index, adapters)
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
    if any(adapter.start_A is not None for adapter, _ in found):
        raise LoraError(
            "combination_type linear cannot combine adapters whose start is subtracted (pissa, "
            "olora); use cat or svd"
        )
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
    parts, rows = [], []
    for index in range(len(first.spec.slices)):
        factors = [(weight, *adapter.factors(index)) for adapter, weight in found]
        parts.append(jnp.concatenate([weight * a for weight, a, _ in factors], axis=-1))
        rows.append(jnp.concatenate([b for _, _, b in factors], axis=-2))
    rank = sum(_rank(adapter) for adapter, _ in found)
    ranks = tuple((rank,) * len(row) for row in first.spec.ranks)
    return _combined(first, ranks, jnp.concatenate(parts, -1), jnp.concatenate(rows, -1))


def _svd(found: list[tuple[Adapter, float]], svd_rank: int | None) -> Adapter:
    first = found[0][0]
    highest = svd_rank or max(_rank(adapter) for adapter, _ in found)
    # A rank cannot exceed the smaller side of its slice.
    sides = [min(first.lora_A.shape[-2], part.size) for part in first.spec.slices]
    if svd_rank is not None and svd_rank > min(sides):
        raise LoraError(f"svd_rank {svd_rank} exceeds the smaller side of a weight: {min(sides)}")
    row = tuple(min(highest, side) for side in sides)
    width, lead = max(row), first.lora_A.shape[:-1]
    a = np.zeros((*lead, len(row) * width), np.float32)
    b = np.zeros((*lead[:-1], width, first.spec.width), np.float32)
    for index, rank in enumerate(row):
        delta = sum(
            weight * jnp.matmul(*adapter.factors(index), precision="highest")
            for adapter, weight in found
        )
        # PEFT's weight is [out, in]: U S belongs to the outputs and goes into B.
        u, s, vt = np.linalg.svd(np.swapaxes(np.asarray(delta), -1, -2), full_matrices=False)
        right = u[..., :rank] * s[..., None, :rank]
        a[..., index * width : index * width + rank] = np.swapaxes(vt[..., :rank, :], -1, -2)
        b[..., :rank, first.spec.columns(index)] = np.swapaxes(right, -1, -2)
    return _combined(first, (row,) * len(first.spec.ranks), a, b)


_COMBINE = {"linear": _linear, "cat": _cat, "svd": _svd}


def _rank(adapter: Adapter) -> int:
    """The rank of the update: twice the adapter's if a start is subtracted."""
    return adapter.spec.rank * len(adapter.terms())


def _combined(first: Adapter, ranks: tuple[tuple[int, ...], ...], a: Any, b: Any) -> Adapter:
    """An adapter with the new arrays and alpha equal to the rank, so its scale is 1."""
    rank = max(max(row) for row in ranks)
    config = dataclasses.replace(
        first.spec.config,
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        init_lora_weights=True,
    )
    alphas = tuple(tuple(float(r or 1) for r in row) for row in ranks)
    spec = Spec(config, first.spec.slices, ranks, alphas, first.spec.features_out)
    stack = first.scale[...].shape[:-1]
    return Adapter(spec, stack, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))


def _refuse_trained_whole(index: ModelIndex, adapters: Sequence[str]) -> None:
    for path, module in index.saved_modules.items():
        for name in adapters:
            if name in module.adapters:
                raise LoraError(
                    f"adapter {name!r} has weights of its own for {dotted(index.place(path))} "
                    "(modules_to_save, trainable tokens, or saved embeddings), which cannot be "
                    "combined"
                )


def _refuse_combining(layer: LoRALayer, adapters: list[Adapter]) -> None:
    if isinstance(layer, LoRAConv):
        raise LoraError("adapters of convolutions cannot be combined")
    if any(adapter.spec.slices != adapters[0].spec.slices for adapter in adapters):
        raise LoraError("adapters of different slices of one layer cannot be combined")
    for adapter in adapters:
        config = adapter.spec.config
        if config.use_dora or config.lora_bias or config.bias != "none":
            raise LoraError(
                "adapters with use_dora, lora_bias or trained biases cannot be combined"
            )
