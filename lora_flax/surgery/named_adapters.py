"""Several named adapters on one model, as in PEFT's `PeftModel`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.index import owners, replace, saved_modules, wrappers
from lora_flax.layers.adapter import Adapter, Spec
from lora_flax.layers.wrappers import LoRAConv, LoRALayer, Rows
from lora_flax.summary import Report, report
from lora_flax.surgery.wrap import activate, insert

# PEFT's name for a row without an adapter.
BASE = "__base__"


def adapter_names(model: nnx.Module) -> list[str]:
    """The names of the model's adapters."""
    return list(dict.fromkeys(name for _, owner in owners(model) for name in _names(owner)))


def active_adapters(model: nnx.Module) -> tuple[str, ...]:
    """The names of the active adapters."""
    found = owners(model)
    return found[0][1].active if found else ()


def add_adapter(
    model: nnx.Module, adapter_name: str, config: LoraConfig, rngs: nnx.Rngs | None = None
) -> Report:
    """Adds an adapter to a wrapped or plain model and activates it.

    Raises:
        LoraError: if the name is taken, the model is merged, or for the same reasons as `wrap`.
    """
    _refuse_merged(model)
    if adapter_name in adapter_names(model):
        raise LoraError(f"there is an adapter {adapter_name!r} already")
    insert(model, config, rngs, adapter_name)
    return report(model)


def set_adapter(model: nnx.Module, adapter_name: str | Sequence[str]) -> None:
    """Activates one adapter, or several whose updates add up: these compute and train.

    Raises:
        LoraError: if the model is merged or has no adapter of that name.
    """
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    _refuse_merged(model)
    _refuse_unknown(model, names)
    activate(model, names)


@contextmanager
def disable_adapter(model: nnx.Module) -> Iterator[None]:
    """Inside the context, the model computes the same as the base.

    Raises:
        LoraError: if the model is merged.
    """
    _refuse_merged(model)
    before = active_adapters(model)
    activate(model, ())
    try:
        yield
    finally:
        activate(model, before)


def delete_adapter(model: nnx.Module, adapter_name: str) -> None:
    """Removes an adapter; layers with no adapters left become plain again.

    If it was the only active adapter, the first remaining one becomes active.

    Raises:
        LoraError: if the model is merged or has no adapter of that name.
    """
    _refuse_merged(model)
    _refuse_unknown(model, (adapter_name,))
    active = tuple(name for name in active_adapters(model) if name != adapter_name)
    for path, owner in owners(model):
        if adapter_name in owner.adapters:
            del owner.adapters[adapter_name]
        if not _names(owner):
            replace(model, path, owner.base)
    activate(model, active or tuple(adapter_names(model)[:1]))


@contextmanager
def mixed_batch(model: nnx.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the context, row i of a batch uses adapter `names[i]`, in a single forward pass.

    Equivalent to PEFT's `adapter_names` argument; `"__base__"` means no adapter. The rows are an
    array in the model's state (`Rows`), so a jitted function accepts a different mix without
    recompiling as long as the set of names is the same.

    Args:
        model: a wrapped model.
        names: one name per row.

    Raises:
        LoraError: if the model has no adapter of that name, or if the adapters use `use_dora`,
            `lora_bias`, modules of their own, or convolutions, none of which can be mixed.
    """
    _refuse_merged(model)
    known = sorted({name for name in names if name != BASE})
    _refuse_unknown(model, known)
    for _, layer in wrappers(model):
        for name in known:
            _refuse_mixing(layer, name)
    if any(name in _names(module) for _, module in saved_modules(model) for name in known):
        raise LoraError("adapters with modules_to_save or trainable tokens cannot be mixed")
    # The base is treated as an adapter that no layer has.
    order = [*known, BASE]
    rows = np.array([order.index(name) for name in names], np.int32)
    layers = [layer for _, layer in wrappers(model)]
    for layer in layers:
        stack = next(iter(_adapters(layer))).scale[...].shape[:-1]
        layer.rows = Rows(jnp.broadcast_to(rows, (*stack, len(names))))
        layer.row_names = tuple(order)
    try:
        yield
    finally:
        for layer in layers:
            layer.rows, layer.row_names = nnx.data(None), ()


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
    _refuse_merged(model)
    _refuse_unknown(model, adapters)
    if adapter_name in adapter_names(model):
        raise LoraError(f"there is an adapter {adapter_name!r} already")
    if not adapters or len(adapters) != len(weights):
        raise LoraError(f"{len(adapters)} adapters need as many weights, not {len(weights)}")
    if combination_type not in _COMBINE:
        raise LoraError(f"combination_type must be linear, cat or svd, not {combination_type!r}")
    layers = [layer for _, layer in wrappers(model)]
    new = []
    for layer in layers:
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
        raise LoraError("combination_type linear needs adapters of one rank; use cat or svd")
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
    a = [[] for _ in range(count)]  # type: ignore[var-annotated]
    b = [[] for _ in range(count)]  # type: ignore[var-annotated]
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
            raise LoraError(f"svd_rank {rank} is above the smaller side of a weight, {s.shape[-1]}")
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


def _refuse_merged(model: nnx.Module) -> None:
    if any(layer.merged for _, layer in wrappers(model)):
        raise LoraError("the model is merged; unmerge it first")


def _refuse_unknown(model: nnx.Module, names: Sequence[str]) -> None:
    there = adapter_names(model)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise LoraError(f"no adapter {', '.join(map(repr, unknown))}; there is {there}")


def _refuse_mixing(layer: LoRALayer, name: str) -> None:
    if name not in layer.adapters:
        return
    if isinstance(layer, LoRAConv):
        raise LoraError("adapters of convolutions cannot be mixed in one batch")
    adapter = layer.adapters[name]
    if adapter.lora_magnitude is not None or adapter.lora_bias is not None:
        raise LoraError(f"{name!r} has use_dora or lora_bias and cannot be mixed in one batch")


def _refuse_combining(layer: LoRALayer, adapters: list[Adapter]) -> None:
    if isinstance(layer, LoRAConv):
        raise LoraError("adapters of convolutions cannot be combined")
    if any(adapter.spec.slices != adapters[0].spec.slices for adapter in adapters):
        raise LoraError("adapters of different slices of one layer cannot be combined")
    for adapter in adapters:
        if adapter.lora_magnitude is not None or adapter.lora_bias is not None:
            raise LoraError("adapters with use_dora or lora_bias cannot be combined")


def _names(owner: Any) -> list[str]:
    return list(owner.adapters.keys())


def _adapters(layer: LoRALayer) -> list[Adapter]:
    return [layer.adapters[name] for name in _names(layer)]
