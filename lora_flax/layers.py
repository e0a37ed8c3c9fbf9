"""A frozen layer plus its low-rank update.

`LoRADense` stands where the dense layer stood and holds it as `base`:

    mlp.up_proj: Linear                      mlp.up_proj: LoRADense
        kernel  Param      [in, out]             base: Linear
                                                     kernel  Param      [in, out]
                                                 lora_A      LoRAParam  [in, r]
                                                 lora_B      LoRAParam  [r, out]

In a stack of layers that runs under `jax.lax.scan` every array has the stack's axis in front, the
update's arrays too, so the wrapper is sliced and scanned like the layer that it wraps.
"""

from __future__ import annotations

import inspect
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError


class UnmergedKernel(nnx.Variable):
    """The base kernel as it was before `merge`: neither a parameter nor trained."""


def kernel_shape(module: object) -> tuple[int, ...] | None:
    """The shape of the module's `kernel`, None if it is not a layer that owns one."""
    kernel = getattr(module, "kernel", None)
    if not isinstance(kernel, nnx.Variable) or not callable(module):
        return None
    return tuple(kernel.get_value().shape)


class LoRADense(nnx.Module):
    """`base(x) + ((dropout(x) @ A) @ B) * scale`.

    As in loralib and PEFT, A starts uniform in +-1/sqrt(in) (`kaiming_uniform_(a=sqrt(5))`) and B
    at zero: the wrapped layer gives what the plain one gave. The bound is that of one layer, also
    in a stack, where an initialiser that sees the whole array would take the stack for fan-in.

    A and B are float32 whatever the base is, and are cast to `x.dtype` for the matmuls: PEFT's
    float32 result in a float32 model, and no float32 activations in a bfloat16 one.

    Args:
        base: a layer with `kernel` `[*stack, in, out]`, called `base(x)` or `base(x, key=key)`.
        config: rank, scale and dropout.
        rngs: gives one `params` key, for A.
    """

    def __init__(self, base: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs):
        shape = kernel_shape(base)
        if shape is None or len(shape) < 2:
            raise LoraError(f"{type(base).__name__} has no kernel of shape [in, out] to adapt")
        *stack, features_in, features_out = shape
        self.base = base
        self.config = config
        self.scale = config.scaling
        # Decided once: trying the call and catching the error would hide errors of the base.
        self.base_takes_key = "key" in inspect.signature(type(base).__call__).parameters
        bound = 1 / math.sqrt(features_in)
        a = jax.random.uniform(
            rngs.params(), (*stack, features_in, config.r), jnp.float32, -bound, bound
        )
        self.lora_A = nnx.LoRAParam(a)  # [*stack, in, r]
        self.lora_B = nnx.LoRAParam(jnp.zeros((*stack, config.r, features_out), jnp.float32))
        self.unmerged_kernel: UnmergedKernel | None = nnx.data(None)

    @property
    def merged(self) -> bool:
        """Whether the base kernel holds the update, and the forward pass is the base's alone."""
        return self.unmerged_kernel is not None

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """The layer's output.

        Args:
            x: `[..., in]`.
            key: for dropout, of the update's input and of a base that has its own; None turns
                both off.

        Returns:
            `[..., out]` in the dtype that the base returns.
        """
        if self.merged:
            return self._call_base(x, key)
        rate = self.config.lora_dropout
        base_key = key
        if key is not None and rate > 0 and self.base_takes_key:
            base_key, key = jax.random.split(key)
        y = self._call_base(x, base_key)
        with jax.named_scope("lora"):
            if key is not None and rate > 0:
                keep = jax.random.bernoulli(key, 1 - rate, x.shape)
                x = jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
            a = self.lora_A[...].astype(x.dtype)
            b = self.lora_B[...].astype(x.dtype)
            # Through the rank first: A @ B would be a full [in, out] matrix on every call.
            update = ((x @ a) @ b) * self.scale
            return y + update.astype(y.dtype)

    def _call_base(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return self.base(x, key=key) if self.base_takes_key else self.base(x)

    def delta(self) -> jax.Array:
        """`A @ B * scale`, float32 `[*stack, in, out]`: what `merge` adds to the kernel."""
        # TPUs and GPUs multiply float32 with fewer bits unless told otherwise; a merged weight is
        # computed once and kept.
        product = jnp.matmul(self.lora_A[...], self.lora_B[...], precision="highest")
        return product * self.scale

    def merge(self) -> None:
        """Adds the update to the base kernel, in float32, and keeps the kernel that was there."""
        if self.merged:
            raise LoraError("this layer is merged already; unmerge it first")
        kernel = self.base.kernel  # type: ignore[attr-defined]
        before = kernel.get_value()
        kernel.set_value((before.astype(jnp.float32) + self.delta()).astype(before.dtype))
        # Subtracting the update again would not give the same bits back.
        self.unmerged_kernel = UnmergedKernel(before)

    def unmerge(self) -> None:
        """Puts back the kernel that `merge` found, bit for bit."""
        if self.unmerged_kernel is None:
            raise LoraError("this layer is not merged")
        self.base.kernel.set_value(self.unmerged_kernel.get_value())  # type: ignore[attr-defined]
        self.unmerged_kernel = nnx.data(None)
