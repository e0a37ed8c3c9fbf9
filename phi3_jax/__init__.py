"""LoRA fine-tuning of the Phi-3 family in JAX: the network, its weights, its data, its training."""

from phi3_jax.config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.folder import resolve
from phi3_jax.generate import generate, stream
from phi3_jax.model import Phi3
from phi3_jax.weights import load, save

__all__ = ["Phi3", "Phi3Config", "UserError", "generate", "load", "resolve", "save", "stream"]
