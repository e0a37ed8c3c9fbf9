"""LoRA fine-tuning of the Phi-3 family in JAX: the network, its weights, its data, its training.

The public names are imported when they are first used: `phi3-jax --help` need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from phi3_jax.checkpoint.checkpoint import Checkpoint, load
    from phi3_jax.checkpoint.hub import resolve
    from phi3_jax.checkpoint.saving import save
    from phi3_jax.errors import UserError
    from phi3_jax.generation.generate import generate, stream
    from phi3_jax.model.config import Phi3Config
    from phi3_jax.model.network import Phi3

__all__ = [
    "Checkpoint",
    "Phi3",
    "Phi3Config",
    "UserError",
    "generate",
    "load",
    "resolve",
    "save",
    "stream",
]

_HOMES = {
    "Checkpoint": "checkpoint.checkpoint",
    "Phi3": "model.network",
    "Phi3Config": "model.config",
    "UserError": "errors",
    "generate": "generation.generate",
    "load": "checkpoint.checkpoint",
    "resolve": "checkpoint.hub",
    "save": "checkpoint.saving",
    "stream": "generation.generate",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'phi3_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"phi3_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
