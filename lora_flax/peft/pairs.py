"""Converts an adapter's arrays to the tensors of a PEFT file, and back.

PEFT stores one pair per layer under its PyTorch name, so a stack is split along its axis and the
index becomes part of the name:

    layers.attn.qkv_proj, lora_A [stack, in, r]
        ->  base_model.model.layers.3.attn.qkv_proj.lora_A.weight  [r, in]

PEFT has no slices of a fused projection. They become one exactly equivalent pair for the fused
layer: the As of all slices side by side, B block-diagonal, and rank and alpha multiplied so that
the scale is unchanged. Alternatively, they keep the names of their projections, for models that
store these separately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.config import scaling
from lora_flax.host import on_host, place_like
from lora_flax.index import Layer
from lora_flax.init.weights import groups, input_shape
from lora_flax.layers.adapter import Adapter, Spec, as_matrix
from lora_flax.layers.wrappers import LoRAConv, LoRAEmbed, LoRALayer
from lora_flax.targets.naming import PREFIX


@dataclass(frozen=True)
class Pair:
    """The update of one PyTorch module.

    Attributes:
        name: name of the module.
        rank, alpha: its `r` and `lora_alpha` in PEFT.
        a: `[in, rank]`, or `[*window, in, rank]` for a convolution.
        b: `[rank, out]`.
        bias, magnitude: `[out]`, or None.
    """

    name: str
    rank: int
    alpha: float
    a: np.ndarray
    b: np.ndarray
    bias: np.ndarray | None
    magnitude: np.ndarray | None


def pairs(layer: Layer, adapter: Adapter, unfused: bool) -> list[Pair]:
    """One layer's adapter as PyTorch pairs, member by member.

    Args:
        layer: a wrapped layer.
        adapter: the layer's adapter.
        unfused: use the names of the layer's individual projections, if it holds several.
    """
    found = []
    for member, name in enumerate(layer.names):
        if not any(adapter.spec.ranks[member]):
            continue
        if unfused and layer.slices:
            found += _unfused(layer, adapter, member, name)
        else:
            found.append(_fused(layer, adapter, member, name))
    return found


def pair_tensors(layer: Layer, pair: Pair) -> dict[str, np.ndarray]:
    """The tensors of a pair, with the keys and layout of PEFT's file."""
    key = PREFIX + pair.name
    a, b = pair.a.T, pair.b.T
    if layer.wrapper is LoRAConv:
        a = np.moveaxis(pair.a, (-1, -2), (0, 1))
        b = b.reshape(*b.shape, *(1,) * (len(layer.kernel) - 2))
    tensors = dict(zip(factor_keys(layer, pair.name), (a, b), strict=True))
    if pair.bias is not None:
        tensors[f"{key}.lora_B.bias"] = pair.bias
    if pair.magnitude is not None:
        shape = (1, -1, *(1,) * (len(layer.kernel) - 2)) if layer.wrapper is LoRAConv else (-1,)
        tensors[f"{key}.lora_magnitude_vector"] = pair.magnitude.reshape(shape)
    # safetensors writes the raw buffer and ignores strides.
    return {k: np.ascontiguousarray(v.astype(np.float32)) for k, v in tensors.items()}


def factor_keys(layer: Layer, name: str) -> tuple[str, str]:
    """The keys of A and B of the module with that name."""
    key = PREFIX + name
    if layer.wrapper is LoRAEmbed:
        return f"{key}.lora_embedding_A", f"{key}.lora_embedding_B"
    return f"{key}.lora_A.weight", f"{key}.lora_B.weight"


def blank_pairs(layer: Layer, spec: Spec) -> list[Pair]:
    """All-zero pairs with the shapes that a spec requires: what a file for it must contain."""
    found = []
    for member, name in enumerate(layer.names):
        for index, part in enumerate(spec.slices):
            rank = spec.ranks[member][index]
            if not rank:
                continue
            a = np.zeros((*input_shape(layer), rank), np.float32)
            b = np.zeros((rank // groups(layer), part.size), np.float32)
            bias = np.zeros(part.size) if spec.config.lora_bias else None
            magnitude = np.zeros(part.size) if spec.config.use_dora else None
            full = layer.slice_name(name, part)
            alpha = spec.alphas[member][index]
            found.append(Pair(full, rank, alpha, a, b, bias, magnitude))
    return found


def fill(layer: Layer, adapter: Adapter, tensors: dict[str, np.ndarray]) -> None:
    """Copies tensors with the keys and shapes of `blank_pairs` into the adapter's arrays."""
    spec = adapter.spec
    arrays = {
        part: on_host(getattr(adapter, part)[...])
        .copy()
        .reshape(len(spec.ranks), *_member(adapter, part))
        for part in ("lora_A", "lora_B", "lora_bias", "lora_magnitude")
        if getattr(adapter, part) is not None
    }
    blank = iter(blank_pairs(layer, spec))
    for member in range(len(spec.ranks)):
        for index in range(len(spec.slices)):
            columns, at = spec.columns(index), index * spec.rank
            rank = spec.ranks[member][index]
            a, b = arrays["lora_A"][member], arrays["lora_B"][member]
            a[..., at : at + spec.rank], b[..., columns] = 0, 0
            if not rank:
                continue
            pair = next(blank)
            a[..., at : at + rank], b_value = _from_torch(layer, pair.name, tensors)
            b[: len(b_value), columns] = b_value
            key = PREFIX + pair.name
            if pair.bias is not None:
                arrays["lora_bias"][member][..., columns] = tensors[f"{key}.lora_B.bias"]
            if pair.magnitude is not None:
                value = tensors[f"{key}.lora_magnitude_vector"].reshape(-1)
                arrays["lora_magnitude"][member][..., columns] = value
    for part, array in arrays.items():
        variable = getattr(adapter, part)
        old = variable.get_value()
        variable.set_value(place_like(old, array.reshape(old.shape)))


def cut_into_slices(
    layer: Layer, spec: Spec, fused: Spec, tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    """Splits a fused file's tensors into those of a spec's slices: the inverse of `pairs`.

    Args:
        layer: the fused layer.
        spec: the slices.
        fused: the spec of the file's pairs; where its scale differs from a slice's, B and its
            bias make up for that.
        tensors: the file's tensors.

    Returns:
        None if a fused B is not block-diagonal in the way that the spec's slices require, or a bias
        or magnitude of other columns was trained.
    """
    found: dict[str, np.ndarray] = {}
    use_rslora = fused.config.use_rslora
    for member, name in enumerate(layer.names):
        key, at = PREFIX + name, 0
        a, b = tensors.get(f"{key}.lora_A.weight"), tensors.get(f"{key}.lora_B.weight")
        total = sum(spec.ranks[member])
        if not total:
            continue
        rank = fused.ranks[member][0]
        if a is None or b is None or len(a) != rank or rank < total or a[total:].any():
            return None
        scale = scaling(fused.alphas[member][0], rank, use_rslora)
        rest = {"lora_B.weight": b.copy()}
        if (bias := tensors.get(f"{key}.lora_B.bias")) is not None:
            rest["lora_B.bias"] = bias.copy()
        if (magnitude := tensors.get(f"{key}.lora_magnitude_vector")) is not None:
            norms = _norms(layer, member)
            same = np.isclose(magnitude, norms, rtol=1e-2)  # the base may be quantized here
            rest["lora_magnitude_vector"] = np.where(same, 0, magnitude)
        for index, part in enumerate(spec.slices):
            rank, rows = spec.ranks[member][index], slice(part.start, part.start + part.size)
            if not rank:
                continue
            new = PREFIX + layer.slice_name(name, part)
            own = scaling(spec.alphas[member][index], rank, spec.config.use_rslora)
            ratio = scale / own
            found[f"{new}.lora_A.weight"] = a[at : at + rank]
            found[f"{new}.lora_B.weight"] = b[rows, at : at + rank] * np.float32(ratio)
            rest["lora_B.weight"][rows, at : at + rank] = 0
            for ending, factor in (("lora_B.bias", ratio), ("lora_magnitude_vector", 1.0)):
                if ending in rest:
                    values = tensors[f"{key}.{ending}"][rows]
                    found[f"{new}.{ending}"] = values * np.float32(factor)
                    rest[ending][rows] = 0
            at += rank
        if any(array.any() for array in rest.values()):
            return None
    return found


def _member(adapter: Adapter, part: str) -> tuple[int, ...]:
    stack = adapter.scale[...].ndim - 1
    shape: tuple[int, ...] = getattr(adapter, part)[...].shape[stack:]
    return shape


def _from_torch(
    layer: Layer, name: str, tensors: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    a, b = (tensors[key] for key in factor_keys(layer, name))
    if layer.wrapper is LoRAConv:
        return np.moveaxis(a, (0, 1), (-1, -2)), b.reshape(b.shape[:2]).T
    return a.T, b.T


def _terms(adapter: Adapter, member: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one member's slice without padding, the start appended; excludes the scale."""
    spec = adapter.spec
    rank, at = spec.ranks[member][index], index * spec.rank
    stack = adapter.scale[...].ndim - 1
    a_parts, b_parts = [], []
    for sign, a, b in adapter.terms():
        a_member = on_host(a).reshape(-1, *a.shape[stack:])[member]
        b_member = on_host(b).reshape(-1, *b.shape[stack:])[member]
        rows = rank * b.shape[-2] // spec.rank
        a_parts.append(a_member[..., at : at + rank])
        b_parts.append(sign * b_member[:rows, spec.columns(index)])
    return np.concatenate(a_parts, axis=-1), np.concatenate(b_parts, axis=-2)


def _alpha(spec: Spec, member: int, index: int, rank: int) -> float:
    """The alpha that gives a pair of that rank the scale of the slice."""
    ratio = rank / spec.ranks[member][index]
    return spec.alphas[member][index] * (math.sqrt(ratio) if spec.config.use_rslora else ratio)


def _fused(layer: Layer, adapter: Adapter, member: int, name: str) -> Pair:
    spec = adapter.spec
    scales = spec.scales()[member]
    indices = [i for i, rank in enumerate(spec.ranks[member]) if rank]
    bias = _row(adapter.lora_bias, member)
    bias = None if bias is None else bias.copy()
    a_parts, blocks = [], []
    for index in indices:
        a, b = _terms(adapter, member, index)
        part = spec.slices[index]
        if not spec.is_whole:
            wide = np.zeros((len(b), spec.features_out), np.float32)
            # A pair has a single scale: B compensates for slices with a different one.
            ratio = scales[index] / scales[indices[0]]
            wide[:, part.start : part.start + part.size] = b * ratio
            b = wide
            if bias is not None:
                bias[spec.columns(index)] *= ratio
        a_parts.append(a)
        blocks.append(b)
    a, b = np.concatenate(a_parts, axis=-1), np.concatenate(blocks, axis=-2)
    rank = a.shape[-1]
    alpha = _alpha(spec, member, indices[0], rank)
    if bias is not None:
        bias = np.asarray(adapter.spread(adapter.split(jnp.asarray(bias))))
    return Pair(name, rank, alpha, a, b, bias, _magnitude(layer, adapter, member))


def _unfused(layer: Layer, adapter: Adapter, member: int, name: str) -> list[Pair]:
    spec, found = adapter.spec, []
    bias, magnitude = (
        _row(values, member) for values in (adapter.lora_bias, adapter.lora_magnitude)
    )

    def cut(values: np.ndarray | None, columns: slice) -> np.ndarray | None:
        return None if values is None else values[columns]

    for part in layer.slices:
        if spec.is_whole:
            # The slices of an update to the full layer share its A.
            index, columns = 0, slice(part.start, part.start + part.size)
            a, b = _terms(adapter, member, 0)
            b = b[:, columns]
        elif part in spec.slices and spec.ranks[member][spec.slices.index(part)]:
            index = spec.slices.index(part)
            columns = spec.columns(index)
            a, b = _terms(adapter, member, index)
        else:
            continue
        rank = a.shape[-1]
        alpha = _alpha(spec, member, index, rank)
        full = layer.slice_name(name, part)
        found.append(Pair(full, rank, alpha, a, b, cut(bias, columns), cut(magnitude, columns)))
    return found


def _row(values: nnx.LoRAParam[Any] | None, member: int) -> np.ndarray | None:
    if values is None:
        return None
    array = on_host(values[...])
    row: np.ndarray = array.reshape(-1, array.shape[-1])[member]
    return row


def _magnitude(layer: Layer, adapter: Adapter, member: int) -> np.ndarray | None:
    """The magnitudes of all columns; columns without an update get the norms of their weights."""
    row = _row(adapter.lora_magnitude, member)
    if row is None or adapter.spec.is_whole:
        return row
    full = _norms(layer, member)
    for index, part in enumerate(adapter.spec.slices):
        if adapter.spec.ranks[member][index]:  # others may have decayed
            full[part.start : part.start + part.size] = row[adapter.spec.columns(index)]
    return full


def _norms(layer: Layer, member: int) -> np.ndarray:
    """The norm of each column of one member's weight in the base, float32 `[out]`."""
    assert isinstance(layer.module, LoRALayer)
    # Only this member's weight goes to the host: the stack may be as large as the model.
    place = tuple(int(i) for i in np.unravel_index(member, layer.stack))
    weight = as_matrix(layer.module.base_kernel[place], 0)
    norms: np.ndarray = np.linalg.norm(on_host(weight).astype(np.float32), axis=0)
    return norms
