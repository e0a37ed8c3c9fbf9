"""Names of modules: paths in the model, dotted names, PyTorch's names and the keys in PEFT's files.

A stack of n layers here is a list of n layers in PyTorch, so one path has n PyTorch names, with the
index after the stack's own component:

    layers (stack_size 2) . attn . qkv_proj   ->   layers.0.attn.qkv_proj, layers.1.attn.qkv_proj
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Attribute names, and integers for list members.
Path = tuple[Any, ...]

# PEFT's model holds the wrapped model as `base_model.model`, and names tensors from there.
PREFIX = "base_model.model."

# PyTorch's names of parameters that Flax names differently.
TORCH_PARAMETERS = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


def dotted(path: Path) -> str:
    """Converts `("layers", 0)` to `layers.0`."""
    return ".".join(str(part) for part in path)


def endings(name: str) -> list[str]:
    """All dotted suffixes: `a.b.c` gives `c`, `b.c`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def torch_names(path: Path, sizes: Iterable[int | None]) -> tuple[str, ...]:
    """A module's names in PyTorch, in row-major order of its stacks.

    Args:
        path: from the model to the module.
        sizes: the stack size of the model itself and of each module on the path; None for a module
            that is not a stack.
    """
    names: list[Path] = [()]
    for part, size in zip((None, *path), sizes, strict=True):
        if part is not None:
            names = [(*name, part) for name in names]
        if size is not None:
            names = [(*name, index) for name in names for index in range(size)]
    return tuple(dotted(name) for name in names)
