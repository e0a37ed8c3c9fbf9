"""A frozen layer plus its low-rank updates.

The wrapper replaces the layer and holds it as `base`, along with its adapters by name:

    mlp.up_proj: Linear                      mlp.up_proj: LoRADense
        kernel  Param      [in, out]             base: Linear
                                                     kernel  Param      [in, out]
                                                 adapters
                                                     default: Adapter
                                                         lora_A  LoRAParam  [in, r]
                                                         lora_B  LoRAParam  [r, out]

In a stack of layers run under `jax.lax.scan`, every array has a leading stack axis, including the
adapters' arrays, so the wrapper is sliced and scanned just like the layer it wraps.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lora_flax.errors import LoraError
from lora_flax.layers.adapter import Adapter, as_matrix, product
from lora_flax.layers.dora import apply_magnitude, merged_weight
from lora_flax.layers.dropout import dropout
from lora_flax.layers.probe import Probe
from lora_flax.layers.trained_whole import Replacement, SavedModule


class Unmerged(nnx.Variable[Any]):
    """The base's weight or bias before `merge`: not a parameter, never trained."""


class Rows(nnx.Variable[Any]):
    """The adapter index of each row of a batch, int32 `[*stack, B]`."""


def _of_layer(name: str) -> Any:
    """A property that reads an attribute of the layer itself."""
    return property(lambda wrapper: getattr(wrapper.plain, name))


class LoRALayer(nnx.Module):
    """Common base class of all wrappers: `base(x)` plus the update of each active adapter.

    Args:
        base: the layer, called as `base(x)` or `base(x, key=key)`.

    Attributes:
        adapters: by name.
        active: names of the adapters in use, in order; a layer skips names it does not have.
            Static.
        rows: set by `mixed_batch`; `row_names` then lists the adapters that it indexes.
        probe: set while EVA or QERA initializes A and B; observes the inputs.
    """

    kernel_name = "kernel"
    in_features = _of_layer("in_features")
    out_features = _of_layer("out_features")
    use_bias = _of_layer("use_bias")

    def __init__(self, base: nnx.Module):
        self.set_base(base)
        self.adapters: Any = nnx.Dict()
        self.active: tuple[str, ...] = ()
        self.row_names: tuple[str, ...] = ()
        self.rows: Rows | None = nnx.data(None)
        self.probe: Probe | None = nnx.data(None)
        self.unmerged_kernel: Unmerged | None = nnx.data(None)
        self.unmerged_bias: Unmerged | None = nnx.data(None)

    def set_base(self, base: nnx.Module) -> None:
        """Replaces the base with another layer of the same shape."""
        self.base = base
        # Checked once up front: calling and catching the error would hide errors in the base.
        self.base_takes_key = "key" in inspect.signature(type(self.plain).__call__).parameters

    @property
    def plain(self) -> Any:
        """The layer itself, below what trains or replaces it in full."""
        return self.base.plain if isinstance(self.base, SavedModule) else self.base

    @property
    def merged(self) -> bool:
        """Whether the base kernel includes the update, so the forward pass is just the base's."""
        return self.unmerged_kernel is not None

    @property
    def in_use(self) -> list[Adapter]:
        """The active adapters that this layer has."""
        return [self.adapters[name] for name in self.active if name in self.adapters]

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None, **options: Any) -> jax.Array:
        """The layer's output.

        Args:
            x: whatever the base takes.
            key: for dropout on each update's input, and for a base with its own dropout; None
                disables both.
            options: other arguments of the base, such as `out_sharding`; passed to it alone.

        Returns:
            What the base returns, with the same shape and dtype.
        """
        if self.merged:
            return self._call_base(x, key, options)
        if self.probe is not None:
            x = self.probe.observe(x)
        adapters = self.in_use
        base_key, keys = self._keys(adapters, key)
        y = self._call_base(x, base_key, options)
        with jax.named_scope("lora"):
            if self.rows is not None:
                return self._add_mixed(x, y)
            for adapter, adapter_key in zip(adapters, keys, strict=True):
                update = self._update(adapter, self._drop(adapter, x, adapter_key), y.dtype)
                if adapter.lora_magnitude is None:
                    y = y + update
                else:
                    y = apply_magnitude(adapter, self.weight, y, update, self.bias)
        return y

    @property
    def kernel(self) -> nnx.Variable[Any]:
        """The base's weight."""
        kernel: nnx.Variable[Any] = getattr(self.plain, self.kernel_name)
        return kernel

    @property
    def weight(self) -> jax.Array:
        """The base's weight as a matrix, `[*stack, in, out]`."""
        stack = next(iter(self.adapters.values())).scale[...].ndim - 1
        return as_matrix(self.kernel[...], stack)

    @property
    def bias(self) -> jax.Array | None:
        """The base's bias `[*stack, out]`, if it has one."""
        bias = getattr(self.plain, "bias", None)
        return None if bias is None else bias[...]

    @property
    def base_kernel(self) -> nnx.Variable[Any]:
        """The base's weight without the updates, even if they are merged into it."""
        return self.kernel if self.unmerged_kernel is None else self.unmerged_kernel

    def merge(self) -> None:
        """Adds the active updates to the base, in float32, and keeps the original values."""
        if self.merged:
            raise LoraError("this layer is already merged; unmerge it first")
        before = self.kernel[...]
        for adapter in self.in_use:
            self.refuse_merge(adapter)
        offsets = [self._scaled_bias(a) for a in self.in_use if a.lora_bias is not None]
        merged = merged_weight(self.in_use, self.weight)
        self.kernel.set_value(merged.reshape(before.shape))
        # Subtracting the update again would not restore the same bits.
        self.unmerged_kernel = Unmerged(before)
        if offsets:
            bias = self.plain.bias[...]
            self.unmerged_bias = Unmerged(bias)
            self.plain.bias.set_value(sum(offsets, bias).astype(bias.dtype))

    def unmerge(self) -> None:
        """Restores the values from before `merge`, bit for bit."""
        if self.unmerged_kernel is None:
            raise LoraError("this layer is not merged")
        self.kernel.set_value(self.unmerged_kernel[...])
        self.unmerged_kernel = nnx.data(None)
        if self.unmerged_bias is not None:
            self.plain.bias.set_value(self.unmerged_bias[...])
            self.unmerged_bias = nnx.data(None)

    def refuse_merge(self, adapter: Adapter) -> None:
        """Raises LoraError if the update cannot be merged into the base."""
        if not isinstance(self.kernel, nnx.Param | Replacement):
            raise LoraError(
                "cannot merge an update into a quantized weight; dequantize the model first"
            )
        if adapter.lora_bias is not None and self.bias is None:
            raise LoraError("lora_bias cannot be merged into a layer that has no bias")

    def _scaled_bias(self, adapter: Adapter) -> jax.Array:
        assert adapter.lora_bias is not None
        parts, scale = adapter.split(adapter.lora_bias[...]), adapter.scale[...]
        return adapter.spread([scale[..., i, None] * part for i, part in enumerate(parts)])

    def _keys(
        self, adapters: list[Adapter], key: jax.Array | None
    ) -> tuple[jax.Array | None, list[jax.Array | None]]:
        """One key for the base and one for each adapter, all distinct."""
        drops = [adapter.spec.config.lora_dropout > 0 for adapter in adapters]
        if key is None or not any(drops):
            return key, [None] * len(adapters)
        base_key = key
        if self.base_takes_key:
            base_key, key = jax.random.split(key)
        return base_key, [key] if len(adapters) == 1 else list(jax.random.split(key, len(adapters)))

    def _drop(self, adapter: Adapter, x: jax.Array, key: jax.Array | None) -> jax.Array:
        rate = adapter.spec.config.lora_dropout
        return x if key is None or not rate else dropout(x, key, rate)

    def _call_base(self, x: jax.Array, key: jax.Array | None, options: Any) -> jax.Array:
        options = {**options, "key": key} if self.base_takes_key else options
        y: jax.Array = self.base(x, **options)
        return y

    def _update(self, adapter: Adapter, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The scaled update `[..., features_out]`.

        Multiplies through the rank first: forming A @ B would create a full matrix on every call.
        The scale is applied on the narrow side.
        """
        spec, scale = adapter.spec, adapter.scale[...]
        total = None
        for sign, a, b in adapter.terms():
            # Named, so that a rematerialization policy can keep it: narrow, but as deep as x.
            h = checkpoint_name(self._down(x, a, dtype), "lora")  # [..., slices * rank]
            h = h.reshape(*h.shape[:-1], len(spec.slices), -1)
            h = (h.astype(jnp.float32) * scale[:, None]).astype(h.dtype)
            parts = [self._up(h[..., i, :], part) for i, part in enumerate(adapter.split(b))]
            update = sign * adapter.spread(parts).astype(dtype)
            total = update if total is None else total + update
        assert total is not None
        if adapter.lora_bias is not None:
            total = total + self._scaled_bias(adapter).astype(dtype)
        return total

    def _down(self, x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
        raise NotImplementedError

    def _up(self, h: jax.Array, b: jax.Array) -> jax.Array:
        return product(h, b.astype(h.dtype))

    def _add_mixed(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Applies each row's own adapter: A and B are gathered by row for a single matmul."""
        assert self.rows is not None
        rows = self.rows[...]
        if rows.shape[0] != x.shape[0]:
            raise LoraError(
                f"mixed_batch names {rows.shape[0]} rows, but a layer was called with "
                f"{x.shape[0]}; this model reshapes its batch before that layer"
            )
        known = [self.adapters[name] if name in self.adapters else None for name in self.row_names]
        width = max(
            (a.spec.rank * len(a.spec.slices) * len(a.terms()) for a in known if a), default=0
        )
        if not width:
            return y
        pairs = [self._fused(adapter, width) for adapter in known]
        a, b = (jnp.stack(matrices)[rows] for matrices in zip(*pairs, strict=True))
        h = self._down_rows(x, a, y.dtype)
        update = jnp.einsum("b...r,bro->b...o", h, b.astype(h.dtype))
        return y + update.reshape(y.shape).astype(y.dtype)

    def _fused(self, adapter: Adapter | None, width: int) -> tuple[jax.Array, jax.Array]:
        """A `[in, width]` and B `[width, out]` of the full layer, zero-padded."""
        features_in, features_out = self.weight.shape[-2:]
        a = jnp.zeros((features_in, width), jnp.float32)
        b = jnp.zeros((width, features_out), jnp.float32)
        at = 0
        for index in range(len(adapter.spec.slices) if adapter else 0):
            assert adapter is not None
            slice_a, slice_b = adapter.factors(index)
            part, rank = adapter.spec.slices[index], slice_a.shape[-1]
            a = a.at[:, at : at + rank].set(slice_a)
            b = b.at[at : at + rank, part.start : part.start + part.size].set(slice_b)
            at += rank
        return a, b

    def _down_rows(self, x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
        raise LoraError(f"{type(self).__name__} cannot mix adapters in one batch")


def without_update(layer: LoRALayer) -> Any:
    """A copy of the layer's base, with the original weight if the update is merged into it."""
    copy = nnx.clone(layer)
    if copy.unmerged_kernel is not None:
        copy.kernel.set_value(copy.unmerged_kernel[...])
    return copy.base


class LoRAEmbed(LoRALayer):
    """`base(tokens) + A[tokens] @ B * scale` for an `embedding` `[num_embeddings, features]`.

    As in PEFT, there is no dropout, and a tied output head (`attend`) uses only the base.
    """

    kernel_name = "embedding"
    num_embeddings = _of_layer("num_embeddings")
    features = _of_layer("features")

    def attend(self, x: jax.Array) -> jax.Array:
        """Same as the base's `attend`, without the update even if it is merged."""
        base: Any = without_update(self) if self.merged else self.base
        scores: jax.Array = base.attend(x)
        return scores

    def _drop(self, adapter: Adapter, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return x

    def _down(self, x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return a[x].astype(dtype)

    def _down_rows(self, x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
        rows = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))
        return a[rows, x].astype(dtype)


class LoRAConv(LoRALayer):
    """A convolution over the base's window into r channels, then one of size 1 to the outputs.

    It uses the base's strides, padding, dilation and groups. PEFT's A has no dilation, and zeros
    for any padding mode, such as circular. As in PEFT, A sees all channels of a base with groups,
    and B is grouped: the sum is not a convolution of the base's shape, so it cannot be merged.
    """

    groups = _of_layer("feature_group_count")

    def refuse_merge(self, adapter: Adapter) -> None:
        super().refuse_merge(adapter)
        if self.groups > 1:
            raise LoraError("an update of a convolution with groups cannot be merged, as in PEFT")

    def _down(self, x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
        # Calls the base itself with a different kernel, so its strides, padding and dilation apply.
        graphdef, state = nnx.split(self.plain)
        conv: Any = nnx.merge(graphdef, state)
        conv.kernel = nnx.Param(a)
        conv.bias = nnx.data(None)
        conv.use_bias = False
        conv.mask = None
        conv.in_features, conv.out_features = a.shape[-2:]
        conv.kernel_shape, conv.feature_group_count = a.shape, 1
        h: jax.Array = conv(x)
        return h

    def _up(self, h: jax.Array, b: jax.Array) -> jax.Array:
        if self.groups == 1:
            return super()._up(h, b)
        grouped = h.reshape(*h.shape[:-1], self.groups, -1)
        weights = b.reshape(b.shape[0], self.groups, -1).astype(h.dtype)
        out = jnp.einsum("...gr,rgo->...go", grouped, weights)
        return out.reshape(*h.shape[:-1], -1)
