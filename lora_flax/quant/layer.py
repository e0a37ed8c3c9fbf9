"""Frozen layers with weights stored in 4 or 8 bits: the Q of QLoRA (arXiv:2305.14314).

    quantize(model, BitsAndBytesConfig(load_in_4bit=True))     before or after `wrap`
    dequantize(model)                                          restores plain layers

A quantized layer replaces the plain one and is called the same way. It is independent of LoRA: a
LoRA layer around it sees a layer with a `kernel` like any other. The kernel is dequantized from its
codes wherever it is used, including in the backward pass, and in a stack run under `jax.lax.scan`
only one layer's kernel is live at a time.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lora_flax.errors import LoraError, at_most_ten
from lora_flax.index import ModelIndex
from lora_flax.kernels.blocks import Platform
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.quant.array import QuantizedArray
from lora_flax.quant.encoding import BLOCK, Kind
from lora_flax.targets.naming import Path, endings

_TYPES = ("float32", "bfloat16", "float16")


class Quantized(nnx.Variable[QuantizedArray]):
    """Holds a quantized weight: not a parameter, since it is not differentiable.

    `kernel[...]` gives the dequantized weight, so code that reads weights treats it as any other;
    `kernel.get_value()` gives the `QuantizedArray`.
    """

    def __getitem__(self, index: Any) -> jax.Array:
        value = self.get_value()
        one = isinstance(index, tuple) and all(isinstance(i, int) for i in index)
        if one and len(index) == value.ndim - 2:
            return value[index].dequantize()  # one member, without dequantizing the others
        return value.dequantize()[index]


@dataclasses.dataclass(frozen=True)
class BitsAndBytesConfig:
    """What to quantize and how, with the field names of transformers' `BitsAndBytesConfig`.

    Attributes:
        load_in_4bit: 4 bits, with one scale per 64 weights: 4.5 bits per weight, or 4.127 with
            double quantization.
        load_in_8bit: 8 bits, with one scale per output. The rest of LLM.int8, keeping
            activation outliers in 16 bits, is left out: matmuls run in the compute dtype anyway.
        bnb_4bit_quant_type: the 4-bit format. The default in transformers is fp4.
        bnb_4bit_use_double_quant: quantize the scales too.
        bnb_4bit_compute_dtype: dtype of the matmuls; by default that of the activations.
        llm_int8_skip_modules: name suffixes of layers that are left unquantized; as in
            transformers, the output head by default. Numbers of a list may be left out of a name.

    Raises:
        LoraError: naming every field with an invalid value.
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    llm_int8_skip_modules: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        problems = []
        if self.load_in_4bit == self.load_in_8bit:
            problems.append("exactly one of load_in_4bit and load_in_8bit must be true")
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
    def kind(self) -> Kind:
        """The kind of `QuantizedArray` that weights become."""
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


class QuantizedDense(nnx.Module):
    """`x @ kernel + bias` with a quantized kernel.

    Args:
        plain: the layer to quantize, with a `kernel` `[*stack, in, out]`.
        config: how to quantize.

    Attributes:
        kernel: the weight.
        bias: the plain layer's, if it has one.
        slices, use_bias: likewise.
        in_features, out_features: sizes of the kernel's last two axes.
        dtype: the plain layer's compute dtype, if it has one; inputs are cast to it.
        platform, fused_rows: inputs with at most `fused_rows` rows use the fused kernel for that
            platform (`lora_flax.use_fused_matmul`); none by default.

    Raises:
        LoraError: if the layer has other arrays, or a kernel that cannot be quantized like this.
    """

    def __init__(self, plain: nnx.Module, config: BitsAndBytesConfig):
        # Used to rebuild the plain layer; excludes its kernel.
        self.plain, _ = nnx.split(plain)
        if odd := _other_arrays(plain):
            raise LoraError(f"{type(plain).__name__} has arrays besides a kernel and a bias: {odd}")
        layer: Any = plain
        kernel: jax.Array = layer.kernel[...]
        self.kernel = Quantized(
            QuantizedArray.quantize(kernel, config.kind, config.bnb_4bit_use_double_quant)
        )
        self.bias = getattr(plain, "bias", nnx.data(None))
        self.slices = getattr(plain, "slices", ())
        self.use_bias = self.bias is not None
        self.in_features, self.out_features = kernel.shape[-2:]
        self.dtype = getattr(plain, "dtype", None)
        self.compute_dtype = config.bnb_4bit_compute_dtype
        self.platform: Platform | None = None
        self.fused_rows = 0

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """`[..., out]` in the layer's compute dtype, or else in x's."""
        del key  # deterministic, like the plain layer
        x = x if self.dtype is None else x.astype(self.dtype)
        compute = x.dtype if self.compute_dtype is None else jnp.dtype(self.compute_dtype)
        platform = self.platform if math.prod(x.shape[:-1]) <= self.fused_rows else None
        y = self.kernel.get_value().matmul(x.astype(compute), platform).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def dequantized(self) -> nnx.Module:
        """The plain layer, with the rounded weight."""
        flat: list[tuple[tuple[str, ...], nnx.Variable[Any]]] = [
            (("kernel",), nnx.Param(self.kernel[...]))
        ]
        if self.bias is not None:
            flat.append((("bias",), self.bias))
        return nnx.merge(self.plain, nnx.from_flat_state(flat))


def quantize(model: nnx.Module, config: BitsAndBytesConfig) -> None:
    """Replaces the dense layers of a model, in place, with quantized ones.

    Layers wrapped by LoRA are quantized inside their wrappers. Embeddings, convolutions and
    `llm_int8_skip_modules` are left unchanged.

    Raises:
        LoraError: if the model is already quantized, there is nothing to quantize, or a layer has
            arrays besides a kernel and a bias, is in a tuple, or, for 4 bits, has a number of
            inputs that is not a multiple of 64; the model is left unchanged.
    """
    index = ModelIndex(model)
    if index.of_type(QuantizedDense):
        raise LoraError("the model is already quantized; dequantize it first")
    chosen, problems = [], []
    skipped = set(config.llm_int8_skip_modules)
    for path, plain, name in _dense_layers(index):
        without_numbers = re.sub(r"\.\d+(?=\.)", "", name)
        if not skipped.isdisjoint([*endings(name), *endings(without_numbers)]):
            continue
        inputs = plain.kernel.shape[-2]
        if config.load_in_4bit and inputs % BLOCK:
            problems.append(f"{name}: 4 bits require a multiple of {BLOCK} inputs, not {inputs}")
        if odd := _other_arrays(plain):
            problems.append(f"{name} has arrays besides a kernel and a bias: {odd}")
        index.replace(path, plain)  # by itself: raises if the layer is in a tuple
        chosen.append((path, plain))
    if problems:
        raise LoraError(
            f"{'; '.join(at_most_ten(problems))}; leave these out with llm_int8_skip_modules"
        )
    if not chosen:
        raise LoraError(f"{type(model).__name__} has no dense layers to quantize")
    for path, plain in chosen:
        index.replace(path, QuantizedDense(plain, config))


def dequantize(model: nnx.Module) -> None:
    """Replaces quantized layers with plain ones that hold the rounded weights."""
    index = ModelIndex(model)
    for path, layer in index.of_type(QuantizedDense).items():
        index.replace(path, layer.dequantized())


def _other_arrays(plain: nnx.Module) -> list[str]:
    """Names of a layer's arrays other than its kernel and bias."""
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(plain))}
    return sorted(names - {"kernel", "bias"})


def _dense_layers(index: ModelIndex) -> list[tuple[Path, Any, str]]:
    """Path, plain layer and name of each layer that can be quantized."""
    found = []
    for layer in index.layers:
        path, module = layer.path, layer.module
        if isinstance(module, LoRALayer):
            if module.merged:
                raise LoraError("the model is merged; unmerge it before quantizing it")
            path, module = (*path, "base"), module.base
        if layer.wrapper.kernel_name == "kernel" and len(layer.kernel) == 2:
            found.append((path, module, layer.name))
    return found
