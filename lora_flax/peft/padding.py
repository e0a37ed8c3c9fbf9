"""One rank for all pairs of a file, by zero padding.

Programs that load adapters agree on a pair's scale only where it is `lora_alpha / r`: vLLM and
SGLang divide by `r`, llama.cpp by the number of rows of each A, and none of them reads
`rank_pattern` or `alpha_pattern`. If all pairs have the same scale, they can be written with the
same rank: rows of zeros in A and columns of zeros in B change nothing, and stay zero in training
because their gradients are zero. Loading drops them again.

All arrays here have PyTorch's layout: the rank is the first axis of A and the second of B. With a
grouped convolution, each of the `groups` consecutive parts of A is padded, and B has
`rank // groups` columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lora_flax.config import scaling
from lora_flax.index import Layer
from lora_flax.init.weights import groups
from lora_flax.layers.adapter import Spec
from lora_flax.peft.pairs import Pair, factor_keys
from lora_flax.targets.matching import Target

Tensors = dict[str, np.ndarray]
# Scales that are equal apart from rounding.
_TOLERANCE = 1e-6


def shared_rank(found: Sequence[tuple[Layer, Pair]], use_rslora: bool) -> int | None:
    """The rank that all pairs can be padded to: the largest, or None if their scales differ.

    It is rounded up to a multiple of the groups of each convolution.
    """
    scales = [scaling(pair.alpha, pair.rank, use_rslora) for _, pair in found]
    if not scales or not all(math.isclose(s, scales[0], rel_tol=_TOLERANCE) for s in scales):
        return None
    multiple = math.lcm(*(groups(layer) for layer, _ in found))
    return -(-max(pair.rank for _, pair in found) // multiple) * multiple


def pad(layer: Layer, name: str, tensors: Tensors, rank: int) -> Tensors:
    """One pair's tensors with A and B padded to `rank`; the others unchanged."""
    key_a, key_b = factor_keys(layer, name)
    parts, b = _by_group(tensors[key_a], groups(layer)), tensors[key_b]
    more = rank // groups(layer) - parts.shape[1]
    parts = np.pad(parts, [(0, 0), (0, more), *[(0, 0)] * (parts.ndim - 2)])
    b = np.pad(b, [(0, 0), (0, more), *[(0, 0)] * (b.ndim - 2)])
    return tensors | {key_a: parts.reshape(rank, *parts.shape[2:]), key_b: b}


def drop_padding(target: Target, tensors: Tensors, wrapped: Spec | None) -> tuple[Target, Tensors]:
    """Removes rows of A and columns of B that are both zero.

    Scales are unchanged. A pair keeps at least one row. Tensors of unexpected shapes are left for
    the caller to report.

    Args:
        target: a layer and the spec that the file's config gives it.
        tensors: the file's tensors.
        wrapped: the spec of the same slices that the model already has; only what exceeds its
            ranks is removed. None removes everything that is zero.

    Returns:
        The target with its new ranks, and all tensors.
    """
    layer, spec = target.layer, target.spec
    alive: dict[tuple[int, int], np.ndarray] = {}
    for member, name in enumerate(layer.names):
        for index, part in enumerate(spec.slices):
            rank = spec.ranks[member][index]
            keys = factor_keys(layer, layer.slice_name(name, part))
            if rank and (rows := _alive(tensors, keys, rank, groups(layer))) is not None:
                alive[member, index] = rows
    if groups(layer) > 1 and alive:
        # All members of a stack of such layers have the same rank.
        union = np.asarray(np.stack(list(alive.values())).any(axis=0))
        alive = dict.fromkeys(alive, union)
    tensors, ranks = dict(tensors), [list(row) for row in spec.ranks]
    alphas = [list(row) for row in spec.alphas]
    for (member, index), rows in alive.items():
        if wrapped is None:
            kept = np.flatnonzero(rows) if rows.any() else np.array([0])
        else:
            kept = np.arange(min(len(rows), wrapped.ranks[member][index] // groups(layer)))
            if rows[len(kept) :].any() or not len(kept):
                continue
        if len(kept) == len(rows):
            continue
        keys = factor_keys(layer, layer.slice_name(layer.names[member], spec.slices[index]))
        a, b = (tensors[key] for key in keys)
        parts = _by_group(a, groups(layer))[:, kept]
        tensors |= {keys[0]: parts.reshape(-1, *a.shape[1:]), keys[1]: b[:, kept]}
        ratio = len(kept) / len(rows)
        ranks[member][index] = len(kept) * groups(layer)
        alphas[member][index] *= math.sqrt(ratio) if spec.config.use_rslora else ratio
    new = dataclasses.replace(
        spec, ranks=tuple(map(tuple, ranks)), alphas=tuple(map(tuple, alphas))
    )
    return Target(layer, new), tensors


def _alive(
    tensors: Mapping[str, np.ndarray], keys: tuple[str, str], rank: int, count: int
) -> np.ndarray | None:
    """Which of the `rank // count` rows are not zero in both; None if the shapes do not fit."""
    a, b = (tensors.get(key) for key in keys)
    if a is None or b is None or a.ndim < 2 or b.ndim < 2:
        return None
    if a.shape[0] != rank or b.shape[1] != rank // count:
        return None
    in_a = np.swapaxes(_by_group(a, count), 0, 1).reshape(rank // count, -1).any(axis=1)
    in_b = np.swapaxes(b, 0, 1).reshape(rank // count, -1).any(axis=1)
    return np.asarray(in_a | in_b)


def _by_group(a: np.ndarray, count: int) -> np.ndarray:
    return a.reshape(count, -1, *a.shape[1:])
