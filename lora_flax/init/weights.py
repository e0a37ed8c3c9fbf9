"""Initialization of A and B: `init_lora_weights`, with PEFT's names and formulas.

The nonzero starts (PiSSA, OLoRA, orthogonal, False) differ from PEFT in one way. PEFT's PiSSA and
OLoRA subtract `A B` from the base weight; here the base is unchanged and the start is subtracted in
the forward pass, `x A B - x A0 B0`. This computes the same function, but the base can be restored
bitwise, can be shared by several adapters and loses no precision in bfloat16. When saved, the start
becomes a second half of A and B (`lora_flax/peft/pairs.py`), as in PEFT's own conversion.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.errors import LoraError
from lora_flax.host import on_host
from lora_flax.index import Layer
from lora_flax.layers.adapter import Adapter, LoRAStart, Spec, as_matrix
from lora_flax.layers.dense import LoRADense
from lora_flax.layers.dora import column_norms
from lora_flax.layers.kinds import plain
from lora_flax.layers.tied_head import LoRATiedHead
from lora_flax.layers.wrappers import LoRAConv, LoRAEmbed

Pair = tuple[np.ndarray, np.ndarray]


def new_adapter(layer: Layer, spec: Spec, kernel: Any, key: jax.Array) -> Adapter:
    """A new adapter for a layer, initialized as its config says.

    Args:
        layer: plain or wrapped.
        spec: the adapter's spec.
        kernel: the base's weight, with the stack's axes; `kernel[...]` is read only if the start
            depends on it.
        key: for random initialization.

    Raises:
        LoraError: for a start that this kind of layer does not support, as in PEFT, and for a
            convolution with a mask.
    """
    if layer.wrapper is LoRAConv and getattr(plain(layer.module), "mask", None) is not None:
        raise LoraError(f"{layer.name} has a mask, which an update cannot keep; leave it out")
    start, deferred = spec.config.init_lora_weights, spec.config.init_is_deferred
    if layer.wrapper is LoRAEmbed and start is not False and not deferred:
        start = True  # as in PEFT, which ignores what it names
    lead = (*layer.stack, *input_shape(layer))
    a_shape = (*lead, len(spec.slices) * spec.rank)
    b_shape = (*layer.stack, spec.rank // groups(layer), spec.width)
    if start is True or start == "gaussian" or deferred:
        if deferred and layer.wrapper is not LoRADense:
            raise LoraError(
                f"init_lora_weights {start} supports only dense layers, not {layer.name}"
            )
        a, b = _zero_update(layer, spec, a_shape, b_shape, key)
    elif start is False:
        keys = jax.random.split(key)
        a, b = (
            _uniform(k, shape, 1 / math.sqrt(shape[-2]))
            for k, shape in zip(keys, (a_shape, b_shape), strict=True)
        )
    else:
        if layer.wrapper is not LoRADense:
            raise LoraError(
                f"init_lora_weights {start} supports only dense layers, not {layer.name}"
            )
        weight = on_host(as_matrix(kernel[...], len(layer.stack))).astype(np.float32)
        pair = _by_member(layer, spec, str(start), weight, key)
        a, b = jnp.asarray(pair[0].reshape(a_shape)), jnp.asarray(pair[1].reshape(b_shape))
    adapter = Adapter(spec, layer.stack, *_mask_padding(layer, spec, a, b))
    if isinstance(start, str) and not deferred and start not in ("gaussian", "orthogonal"):
        adapter.start_A = LoRAStart(adapter.lora_A[...])
        adapter.start_B = LoRAStart(adapter.lora_B[...])
    if spec.config.use_dora:
        if layer.wrapper is LoRATiedHead:
            raise LoraError(f"use_dora does not support a head that is tied ({layer.name})")
        if groups(layer) > 1:
            raise LoraError(f"use_dora does not support convolutions with groups ({layer.name})")
        set_magnitude(adapter, as_matrix(kernel[...], len(layer.stack)))
    return adapter


def set_magnitude(adapter: Adapter, weight: jax.Array) -> None:
    """Initializes DoRA's magnitudes to the column norms of the weight `[*stack, in, out]`."""
    adapter.lora_magnitude = nnx.LoRAParam(column_norms(adapter, weight))


def groups(layer: Layer) -> int:
    """The number of groups of a convolution; 1 for other layers."""
    if layer.wrapper is not LoRAConv:
        return 1
    count: int = plain(layer.module).feature_group_count
    return count


def input_shape(layer: Layer) -> tuple[int, ...]:
    """Input shape of A: `[in]`, or `[*window, in]` for a convolution, over all groups' channels."""
    return (*layer.kernel[:-2], layer.kernel[-2] * groups(layer))


def _zero_update(
    layer: Layer,
    spec: Spec,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """loralib's: A uniform in +-1/sqrt(in), B zero; for an embedding A zero, B normal.

    The bound is that of torch's `kaiming_uniform_(a=sqrt(5))` for a single layer. This also holds
    in a stack, where an initializer applied to the full array would count the stack axis toward
    fan-in. "gaussian" is PEFT's: normal with standard deviation 1/r.
    """
    if layer.wrapper is LoRAEmbed:
        return jnp.zeros(a_shape, jnp.float32), jax.random.normal(key, b_shape, jnp.float32)
    b = jnp.zeros(b_shape, jnp.float32)
    if spec.config.init_lora_weights == "gaussian":
        ranks = np.maximum(np.array(spec.ranks, np.float32), 1)  # [member, slice]
        std = np.repeat(1 / ranks, spec.rank, axis=1)
        std = std.reshape(*layer.stack, *(1,) * (len(layer.kernel) - 1), -1)
        return jax.random.normal(key, a_shape, jnp.float32) * std, b
    return _uniform(key, a_shape, 1 / math.sqrt(math.prod(input_shape(layer)))), b


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _mask_padding(
    layer: Layer, spec: Spec, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Zeros out the padding where a member's or slice's rank is below the width of the arrays."""
    ranks = np.array(spec.ranks)
    if (ranks == spec.rank).all():
        return a, b
    inside = np.arange(spec.rank) < ranks[..., None]  # [member, slice, rank]
    a_mask = inside.reshape(*layer.stack, *(1,) * (len(layer.kernel) - 1), -1)
    sizes = [part.size for part in spec.slices]
    b_mask = np.repeat(np.swapaxes(inside, 1, 2), sizes, axis=2)  # [member, rank, width]
    return a * a_mask, b * b_mask.reshape(*layer.stack, *b_mask.shape[1:])[..., : b.shape[-2], :]


def _by_member(layer: Layer, spec: Spec, start: str, weight: np.ndarray, key: jax.Array) -> Pair:
    """A `[member, in, slices * rank]` and B `[member, rank, width]`, one weight at a time."""
    members = weight.reshape(-1, *weight.shape[-2:])
    a = np.zeros((len(members), layer.features_in, len(spec.slices) * spec.rank), np.float32)
    b = np.zeros((len(members), spec.rank, spec.width), np.float32)
    scales = spec.scales()
    keys = jax.random.split(key, len(members) * len(spec.slices)).reshape(len(members), -1)
    for m, w in enumerate(members):
        for s, part in enumerate(spec.slices):
            rank = spec.ranks[m][s]
            if not rank:
                continue
            columns = w[:, part.start : part.start + part.size]
            pair = _start(start, columns, rank, float(scales[m, s]), keys[m, s])
            a[m, :, s * spec.rank : s * spec.rank + rank] = pair[0]
            b[m, :rank, spec.columns(s)] = pair[1]
    return a, b


def _start(start: str, weight: np.ndarray, rank: int, scale: float, key: jax.Array) -> Pair:
    """A `[in, r]` and B `[r, out]` for one weight `[in, out]`."""
    if start == "olora":
        # torch's weight is [out, in]: its Q is a basis of the outputs.
        q, r = np.linalg.qr(weight.T)
        return r[:rank].T, q[:, :rank].T
    if start == "orthogonal":
        return _orthogonal(weight.shape, rank, key)
    if start == "pissa":
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vt = _svd_lowrank(weight, rank, int(start.rsplit("_", 1)[1]), key)
    root = np.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _orthogonal(shape: tuple[int, ...], rank: int, key: jax.Array) -> Pair:
    """Even and odd rows of one orthogonal matrix, so A B is zero but neither A nor B is."""
    if rank % 2:
        raise LoraError(f"init_lora_weights orthogonal needs an even rank, not {rank}")
    keys = jax.random.split(key, 3)
    q, _ = np.linalg.qr(np.asarray(jax.random.normal(keys[0], (rank, rank))))
    a = np.asarray(jax.random.normal(keys[1], (shape[0], rank // 2))) @ q[0::2] / 10.0
    b = np.asarray(jax.random.normal(keys[2], (shape[1], rank // 2))) @ q[1::2] / 10.0
    return a.astype(np.float32), b.T.astype(np.float32)


def _svd_lowrank(
    weight: np.ndarray, rank: int, niter: int, key: jax.Array
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular triplets by subspace iteration (Halko et al. 2009, algorithm 5.1)."""
    q = np.asarray(jax.random.normal(key, (weight.shape[1], rank)))
    q, _ = np.linalg.qr(weight @ q)
    for _ in range(niter):
        q, _ = np.linalg.qr(weight.T @ q)
        q, _ = np.linalg.qr(weight @ q)
    u, s, vt = np.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, vt
