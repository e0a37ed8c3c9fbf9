"""LoRA fine-tuning of the Phi-3 family in JAX: the network, its weights, its data, its training."""

from phi3_jax.checkpoint.folder import resolve
from phi3_jax.checkpoint.weights import load, save
from phi3_jax.errors import UserError
from phi3_jax.generation.generate import generate, stream
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3

__all__ = ["Phi3", "Phi3Config", "UserError", "generate", "load", "resolve", "save", "stream"]
