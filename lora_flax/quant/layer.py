"""Frozen layers with weights stored in 4 or 8 bits: the Q of QLoRA (arXiv:2305.14314).

    quantize(model, BitsAndBytesConfig(load_in_4bit=True))     before or after `wrap`
    dequantize(model)                                          the plain layers again

A quantized layer replaces the plain one and is called the same way. It is independent of LoRA: a
LoRA layer around it sees a layer with a `kernel` like any other. The kernel is dequantized from its
codes wherever it is used, including in the backward pass, and in a stack run under `jax.lax.scan`
only one layer's kernel is live at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.errors import LoraError
from lora_flax.index import Path, endings, find_layers, get, replace
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.quant import nf4
from lora_flax.quant import pallas as fused
from lora_flax.quant.nf4 import BLOCK, Arrays, QuantType
from lora_flax.quant.pallas import Platform

# As in transformers, the output head keeps its precision.
SKIPPED = ("lm_head",)
_TYPES = ("float32", "bfloat16", "float16")


class Quantized(nnx.Variable):
    """Codes and scales of a weight: not a parameter, since it is not differentiable."""


@dataclasses.dataclass(frozen=True)
class BitsAndBytesConfig:
    """What to quantize and how, with the field names of transformers' `BitsAndBytesConfig`.

    Attributes:
        load_in_4bit: 4 bits and a scale for each 64 weights: 4.5 bits per weight, or 4.127 with
            double quantization.
        load_in_8bit: 8 bits, with one scale per output. The rest of LLM.int8, keeping
            activation outliers in 16 bits, is left out: matmuls run in the compute dtype anyway.
        bnb_4bit_quant_type: `nf4` (the default; transformers defaults to fp4) or `fp4`.
        bnb_4bit_use_double_quant: quantize the scales too.
        bnb_4bit_compute_dtype: dtype of the matmuls; None uses the activations' dtype.
        llm_int8_skip_modules: name suffixes of layers that are left unquantized.

    Raises:
        LoraError: naming every field with an invalid value.
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: str | None = None
    llm_int8_skip_modules: tuple[str, ...] = SKIPPED

    def __post_init__(self) -> None:
        problems = []
        if self.load_in_4bit == self.load_in_8bit:
            problems.append("one of load_in_4bit and load_in_8bit must be true")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            problems.append(
                f"bnb_4bit_quant_type must be nf4 or fp4, not {self.bnb_4bit_quant_type!r}"
            )
        if self.bnb_4bit_compute_dtype not in (None, *_TYPES):
            problems.append(
                f"bnb_4bit_compute_dtype must be one of {', '.join(_TYPES)}, not "
                f"{self.bnb_4bit_compute_dtype!r}"
            )
        if problems:
            raise LoraError("; ".join(problems))
        object.__setattr__(self, "llm_int8_skip_modules", tuple(self.llm_int8_skip_modules))

    @property
    def quant_type(self) -> QuantType:
        """The format that weights are quantized to."""
        if self.load_in_8bit:
            return "int8"
        return "nf4" if self.bnb_4bit_quant_type == "nf4" else "fp4"

    def quantize(self, model: nnx.Module) -> None:
        """Same as `quantize(model, self)`."""
        quantize(model, self)

    def to_json(self) -> dict[str, Any]:
        """The fields as transformers writes them to a `config.json`."""
        fields = dataclasses.asdict(self) | {"quant_method": "bitsandbytes"}
        fields["llm_int8_skip_modules"] = list(self.llm_int8_skip_modules)
        fields["bnb_4bit_compute_dtype"] = self.bnb_4bit_compute_dtype or "float32"
        return fields


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight that is dequantized from its codes when it is read, `kernel[...]`.

    Attributes:
        arrays: as returned by `nf4.quantize`, with leading stack axes.
        quant_type: how to decode them.
        shape: shape of the weight, `[*stack, in, out]`.
        dtype: dtype of the weight.
    """

    arrays: Arrays
    quant_type: QuantType
    shape: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def get_value(self) -> jax.Array:
        """The weight; a stack is dequantized one layer at a time."""
        return _dequantize(self.arrays, self.quant_type, self.dtype, self.ndim - 2)

    def __getitem__(self, index: Any) -> jax.Array:
        return self.get_value()[index]


class QuantizedDense(nnx.Module):
    """`x @ kernel + bias` with a quantized kernel.

    Args:
        plain: the layer to quantize, with a `kernel` `[*stack, in, out]`.
        stack: number of leading axes that are stack axes.
        config: how to quantize.

    Attributes:
        codes, absmax, nested_absmax, offset: see `nf4.quantize`; the last two only with double
            quantization.
        bias: the plain layer's, if it has one.
        slices: likewise.
        platform, fused_rows: inputs with at most `fused_rows` rows use the fused kernel for that
            platform (`lora_flax.use_fused_matmul`); none by default.
    """

    def __init__(self, plain: nnx.Module, stack: int, config: BitsAndBytesConfig):
        kernel = plain.kernel[...]  # type: ignore[attr-defined]
        self.quant_type: QuantType = config.quant_type
        self.double = config.bnb_4bit_use_double_quant and self.quant_type != "int8"
        self.compute_dtype = config.bnb_4bit_compute_dtype
        self.shape, self.dtype = tuple(kernel.shape), kernel.dtype
        self.platform: Platform | None = None
        self.fused_rows = 0
        # Used to rebuild the plain layer; excludes its kernel.
        self.plain, state = nnx.split(plain)
        self.bias = getattr(plain, "bias", nnx.data(None))
        self.slices = getattr(plain, "slices", ())
        known = {"kernel", "bias"}
        odd = sorted({".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)} - known)
        if odd:
            raise LoraError(f"{type(plain).__name__} has {odd} beside a kernel and a bias")
        for name, array in _quantize(kernel, self.quant_type, self.double, stack).items():
            setattr(self, name, Quantized(array))

    @property
    def arrays(self) -> Arrays:
        """Codes and scales by name."""
        names = ("codes", "absmax", "nested_absmax", "offset")
        return {name: getattr(self, name)[...] for name in names if hasattr(self, name)}

    @property
    def kernel(self) -> Kernel:
        """The weight, dequantized on read."""
        # Inside a scan the arrays have lost their stack axes, so the shape is derived from them.
        stack = self.codes[...].shape[:-2]  # type: ignore[attr-defined]
        return Kernel(self.arrays, self.quant_type, (*stack, *self.shape[-2:]), self.dtype)

    def quantized(self, kernel: jax.Array) -> Arrays:
        """The arrays of one stack member, from its `[in, out]` kernel."""
        return nf4.quantize(kernel, self.quant_type, self.double)

    def from_bitsandbytes(
        self,
        quant_type: str,
        packed: np.ndarray,
        absmax: np.ndarray,
        nested_absmax: np.ndarray | None,
        offset: float,
    ) -> dict[str, np.ndarray]:
        """The arrays of one stack member, from what bitsandbytes stores in a file.

        Raises:
            LoraError: if they are of a different kind than this layer's.
        """
        double = nested_absmax is not None
        if (quant_type, double) != (self.quant_type, self.double):
            raise LoraError(
                f"the weight is {quant_type} with{'' if double else 'out'} double quantization, "
                f"the layer {self.quant_type} with{'' if self.double else 'out'}"
            )
        shape = (self.shape[-1], self.shape[-2])
        return nf4.from_bitsandbytes(packed, absmax, shape, nested_absmax, offset)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """`[..., out]` in x's dtype."""
        del key  # deterministic, as the plain layer
        compute = x.dtype if self.compute_dtype is None else jnp.dtype(self.compute_dtype)
        platform = self.platform if math.prod(x.shape[:-1]) <= self.fused_rows else None
        y = matmul((self.quant_type, platform), x.astype(compute), self.arrays).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def dequantized(self) -> nnx.Module:
        """The plain layer."""
        flat: list[tuple[tuple[str, ...], nnx.Variable]] = [
            (("kernel",), nnx.Param(self.kernel[...]))
        ]
        if self.bias is not None:
            flat.append((("bias",), self.bias))
        return nnx.merge(self.plain, nnx.from_flat_state(flat))


# How to decode the arrays, and the platform of the fused kernel if one is used.
How = tuple[QuantType, Platform | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(how: How, x: jax.Array, arrays: Arrays) -> jax.Array:
    """`x @ kernel` `[..., out]`, in x's dtype.

    The backward pass dequantizes the kernel again: keeping every layer's kernel from the forward
    pass would hold the full model in x's dtype.
    """
    quant_type, platform = how
    if platform is None:
        return x @ nf4.dequantize(arrays, quant_type, x.dtype)
    out = fused.matmul(x.reshape(-1, x.shape[-1]), arrays, quant_type, platform)
    return out.reshape(*x.shape[:-1], -1)


def _matmul_fwd(how: How, x: jax.Array, arrays: Arrays):
    return matmul(how, x, arrays), arrays


def _matmul_bwd(how: How, arrays: Arrays, gradient: jax.Array):
    quant_type, platform = how
    if platform is None:
        return gradient @ nf4.dequantize(arrays, quant_type, gradient.dtype).T, None
    flat = gradient.reshape(-1, gradient.shape[-1])
    out = fused.matmul_transposed(flat, arrays, quant_type, platform)
    return out.reshape(*gradient.shape[:-1], -1), None


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def quantize(model: nnx.Module, config: BitsAndBytesConfig) -> None:
    """Replaces the dense layers of a model, in place, with quantized ones.

    Layers wrapped by LoRA are quantized inside their wrappers. Embeddings, convolutions and
    `llm_int8_skip_modules` are left unchanged.

    Raises:
        LoraError: if the model is already quantized, the number of inputs of a layer is not a
            multiple of 64, or there is nothing to quantize; the model is left unchanged.
    """
    if any(isinstance(module, QuantizedDense) for _, module in nnx.iter_modules(model)):
        raise LoraError("the model is quantized already; dequantize it first")
    chosen = []
    for path, plain, name, stack in _dense_layers(model):
        if not set(config.llm_int8_skip_modules).isdisjoint(endings(name)):
            continue
        inputs = plain.kernel.shape[-2]
        if config.load_in_4bit and inputs % BLOCK:
            raise LoraError(
                f"{name}: 4 bits need inputs in blocks of {BLOCK}, it has {inputs}; name it in "
                "llm_int8_skip_modules"
            )
        chosen.append((path, plain, stack))
    if not chosen:
        raise LoraError(f"{type(model).__name__} has no dense layer to quantize")
    for path, plain, stack in chosen:
        _put(model, path, QuantizedDense(plain, stack, config))


def dequantize(model: nnx.Module) -> None:
    """Replaces quantized layers with plain ones that hold the rounded weights."""
    layers = [(p, m) for p, m in nnx.iter_modules(model) if isinstance(m, QuantizedDense)]
    for path, layer in layers:
        _put(model, path, layer.dequantized())


def _put(model: nnx.Module, path: Path, layer: nnx.Module) -> None:
    owner = get(model, path[:-1])
    if isinstance(owner, LoRALayer):
        owner.set_base(layer)
    else:
        replace(model, path, layer)


def _dense_layers(model: nnx.Module) -> list[tuple[Path, Any, str, int]]:
    """Path, plain layer, name and number of stack axes of each layer that can be quantized."""
    found = []
    for layer in find_layers(model):
        path, module = layer.path, layer.module
        if isinstance(module, LoRALayer):
            if module.merged:
                raise LoraError("the model is merged; unmerge it before it is quantized")
            path, module = (*path, "base"), module.base
        if layer.wrapper.kernel_name == "kernel" and len(layer.kernel) == 2:
            found.append((path, module, re.sub(r"\.\d+(?=\.)", "", layer.name), len(layer.stack)))
    return found


def _quantize(kernel: jax.Array, quant_type: QuantType, double: bool, stack: int) -> Arrays:
    function = functools.partial(nf4.quantize, quant_type=quant_type, double=double)
    return _by_layer(function, stack)(kernel)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dequantize(arrays: Arrays, quant_type: QuantType, dtype: jnp.dtype, stack: int) -> jax.Array:
    function = functools.partial(nf4.dequantize, quant_type=quant_type, dtype=dtype)
    return _by_layer(function, stack)(arrays)


def _by_layer(function, stack: int):
    for _ in range(stack):
        function = functools.partial(jax.lax.map, function)
    return function
