"""Models of shapes and dtypes only, for counting bytes or filling with weights."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

import lora_flax
from lora_flax import BitsAndBytesConfig
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3


def abstract_model(config: Phi3Config, dtype: jnp.dtype | str = "float32") -> Phi3:
    """A model of this architecture with shapes and dtypes only."""
    model: Phi3 = nnx.eval_shape(lambda: Phi3(config, rngs=nnx.Rngs(0), dtype=dtype))
    return model


def abstract_quantized(plain: Phi3, quantization: BitsAndBytesConfig) -> Phi3:
    """An abstract model with its layers quantized; `plain` is left unchanged.

    Raises:
        lora_flax.LoraError: a layer that cannot be quantized as requested.
    """
    model: Phi3 = nnx.eval_shape(functools.partial(_quantize, quantization=quantization), plain)
    return model


def _quantize(model: Phi3, quantization: BitsAndBytesConfig) -> Phi3:
    lora_flax.quantize(model, quantization)
    return model


def model_bytes(model: Phi3) -> int:
    """Total bytes of a model's arrays; the model may be abstract."""
    leaves = jax.tree.leaves(nnx.state(model))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
