"""An update of an output head that reads an embedding's weight.

Such a head is a module of its own, without arrays. It names the shape of the weight that it reads
in a static attribute, `tied_shape = (in, out)`, and is called with the embedding:

    lm_head: TiedHead              lm_head: LoRATiedHead
                                       base: TiedHead
                                       adapters

As in PEFT, the update changes the head alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_flax.errors import LoraError
from lora_flax.layers.adapter import Adapter
from lora_flax.layers.dora import merged_weight
from lora_flax.layers.wrappers import LoRALayer


class LoRATiedHead(LoRALayer):
    """`head(x, embedding) + ((dropout(x) @ A) @ B) * scale`.

    It cannot be merged in place, for the embedding's weight would change with it:
    `merge_and_unload` gives the head a weight of its own.
    """

    kernel_name = ""  # it has no weight that could be quantized

    def __call__(
        self,
        x: jax.Array,
        embedding: Any = None,
        *,
        key: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Scores `[..., rows]` of `x` `[..., features]` against every row of the embedding."""
        head: Any = self.base
        y: jax.Array = head(x, embedding, **options)
        adapters = self.in_use
        _, keys = self._keys(adapters, key)
        with jax.named_scope("lora"):
            if self.rows is not None:
                return self._add_mixed(x, y)
            for adapter, adapter_key in zip(adapters, keys, strict=True):
                y = y + self._update(adapter, self._drop(adapter, x, adapter_key), y.dtype)
        return y

    @property
    def kernel(self) -> Any:
        """None: the weight is the embedding's."""
        return None

    @property
    def weight(self) -> Any:
        """The shape of the weight alone."""
        return jax.ShapeDtypeStruct(self.plain.tied_shape, jnp.float32)

    def merge(self) -> None:
        """Refuses if there is an update to merge."""
        for adapter in self.in_use:
            self.refuse_merge(adapter)

    def refuse_merge(self, adapter: Adapter) -> None:
        raise LoraError(
            "an update of an output head that is tied to the embedding cannot be merged into their "
            "weight; merge_and_unload gives the head one of its own"
        )

    def folded_into(self, embedding: Any) -> nnx.Module:
        """A copy of the embedding with the weight that the head has with its active updates.

        Raises:
            LoraError: for `lora_bias`, which no head without a bias can hold.
        """
        if any(adapter.lora_bias is not None for adapter in self.in_use):
            raise LoraError("lora_bias cannot be merged into a layer that has no bias")
        copy: Any = nnx.clone(embedding)
        merged = merged_weight(self.in_use, copy.embedding[...].T)
        copy.embedding.set_value(merged.T)
        module: nnx.Module = copy
        return module

    def _down(self, x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return x @ a.astype(x.dtype)

    def _down_rows(self, x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.einsum("b...i,bir->b...r", x, a.astype(x.dtype))
