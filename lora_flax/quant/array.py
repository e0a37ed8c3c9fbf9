"""`QuantizedArray`: a weight in 4 or 8 bits, or a stack of them, as one JAX value."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_flax.errors import LoraError
from lora_flax.kernels.blocks import Platform
from lora_flax.quant import encoding
from lora_flax.quant.encoding import BLOCK, NESTED_BLOCK, Encoded, Kind
from lora_flax.quant.matmul import matmul

_STATE = "quant_state.bitsandbytes__"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_absmax", "offset"],
    meta_fields=["kind", "kernel_shape", "dtype"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A frozen kernel `[in, out]`, or a stack `[*stack, in, out]`, as codes and scales.

    A pytree whose leaves have the stack's axes in front, so it can be scanned, mapped, donated,
    sharded and indexed like the stack of plain kernels it represents.

    Attributes:
        codes, absmax, nested_absmax, offset: see `lora_flax.quant.encoding.Encoded`, with leading
            stack axes; the last two are None without double quantization.
        kind: `nf4`, `fp4` or `int8`. Static.
        kernel_shape: `(in, out)`. Static.
        dtype: dtype of the kernel. Static.
    """

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None
    offset: jax.Array | None
    kind: Kind
    kernel_shape: tuple[int, int]
    dtype: jnp.dtype

    @classmethod
    def quantize(cls, kernel: jax.Array, kind: Kind, double: bool = False) -> QuantizedArray:
        """Rounds a kernel to bitsandbytes' values, one member of a stack at a time.

        Args:
            kernel: `[*stack, in, out]`, any float dtype; for 4 bits `in` is a multiple of 64.
            kind: `nf4`, `fp4` or `int8`.
            double: quantize the scales of 4-bit blocks too.

        Raises:
            LoraError: if `in` is not a multiple of 64 for 4 bits.
        """
        *stack, inputs, outputs = kernel.shape
        if kind != "int8" and inputs % BLOCK:
            raise LoraError(f"4 bits require a multiple of {BLOCK} inputs, not {inputs}")
        encode = functools.partial(encoding.quantize, kind=kind, double=double and kind != "int8")
        encoded: Encoded = _by_member(encode, len(stack))(kernel)
        return cls(*encoded, kind, (inputs, outputs), jnp.dtype(kernel.dtype))

    @classmethod
    def from_bitsandbytes(
        cls, packed: np.ndarray, state: Mapping[str, np.ndarray], dtype: jnp.dtype
    ) -> QuantizedArray:
        """A kernel `[in, out]` from the 4-bit weight `[out, in]` of a file, on the host.

        Args:
            packed: uint8, the codes in bitsandbytes' layout.
            state: the other arrays of that weight by the names of bitsandbytes'
                `QuantState.as_dict(packed=True)`.
            dtype: dtype of the kernel, regardless of its dtype before quantization.

        Raises:
            LoraError: if the state is damaged, has other block sizes or an unknown array, or does
                not match the codes.
        """
        kind, (outputs, inputs), settings = _read_state(state)
        nested: Any = state.get("nested_absmax")
        offset: Any = None if nested is None else np.float32(settings.get("nested_offset", 0.0))
        dtype = jnp.dtype(dtype)
        plain = jax.ShapeDtypeStruct((inputs, outputs), dtype)
        fitting = jax.eval_shape(lambda k: cls.quantize(k, kind, nested is not None), plain)
        try:
            arrays: tuple[Any, Any] = encoding.repack(packed, state["absmax"], outputs)
        except (ValueError, KeyError) as error:
            raise LoraError(f"the codes and scales do not match: {error}") from None
        found = cls(*arrays, nested, offset, kind, (inputs, outputs), dtype)
        shapes, needed = ([leaf.shape for leaf in jax.tree.leaves(a)] for a in (found, fitting))
        if shapes != needed:
            raise LoraError(f"codes and scales have the shapes {shapes}, not {needed}")
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """`(*stack, in, out)`."""
        # Derived from the codes, since scan, vmap and indexing take axes away.
        return (*self.codes.shape[:-2], *self.kernel_shape)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def double(self) -> bool:
        """Whether the scales are quantized too."""
        return self.nested_absmax is not None

    @property
    def scheme(self) -> str:
        """The kind and whether it is double, for messages."""
        return f"{self.kind} with{'' if self.double else 'out'} double quantization"

    def __getitem__(self, index: Any) -> QuantizedArray:
        """Members of the stack; the index must not cover the axes `in` and `out`."""
        members: QuantizedArray = jax.tree.map(lambda leaf: leaf[index], self)
        return members

    def dequantize(self, dtype: jnp.dtype | None = None) -> jax.Array:
        """The kernel `[*stack, in, out]`, one member at a time; `dtype` defaults to its own."""
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        kernel: jax.Array = _dequantize(self._encoded, self.kind, dtype, self.ndim - 2)
        return kernel

    def matmul(self, x: jax.Array, platform: Platform | None = None) -> jax.Array:
        """`x @ kernel` `[..., out]` in x's dtype, for a kernel without stack axes.

        The backward pass dequantizes the kernel again instead of keeping it.

        Args:
            x: `[..., in]`.
            platform: multiplies with the fused kernel for that platform; None uses XLA.
        """
        return matmul(x, self._encoded, self.kind, platform)

    @property
    def _encoded(self) -> Encoded:
        return Encoded(self.codes, self.absmax, self.nested_absmax, self.offset)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dequantize(encoded: Encoded, kind: Kind, dtype: jnp.dtype, stack: int) -> jax.Array:
    function = functools.partial(encoding.dequantize, kind=kind, dtype=dtype)
    kernel: jax.Array = _by_member(function, stack)(encoded)
    return kernel


def _by_member(function: Callable[[Any], Any], stack: int) -> Callable[[Any], Any]:
    for _ in range(stack):
        function = functools.partial(jax.lax.map, function)
    return function


def _read_state(state: Mapping[str, np.ndarray]) -> tuple[Kind, list[int], dict[str, Any]]:
    """Kind, shape `[out, in]` and settings of a weight in a file of bitsandbytes."""
    # The tables never vary, so they are not read.
    parts = {"absmax", "quant_map", "nested_absmax", "nested_quant_map"}
    kinds: dict[str, Kind] = {f"{_STATE}nf4": "nf4", f"{_STATE}fp4": "fp4"}
    if odd := sorted(state.keys() - parts - kinds.keys()):
        raise LoraError(f"unexpected arrays in bitsandbytes' 4-bit format: {', '.join(odd)}")
    names = [name for name in kinds if name in state]
    if len(names) != 1:
        raise LoraError(f"expected exactly one of {', '.join(kinds)}, not {names}")
    try:
        settings = json.loads(state[names[0]].tobytes())
        blocks = (settings["blocksize"], settings.get("nested_blocksize", NESTED_BLOCK))
        outputs, inputs = settings["shape"]
    except (ValueError, KeyError, TypeError):
        raise LoraError(f"{names[0]} is damaged") from None
    if blocks != (BLOCK, NESTED_BLOCK):
        raise LoraError(f"the block sizes are {blocks}; only {(BLOCK, NESTED_BLOCK)} is supported")
    return kinds[names[0]], [outputs, inputs], settings
