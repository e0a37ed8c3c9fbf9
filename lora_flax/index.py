"""Finds the layers of a model, under the names that PyTorch would give them.

A module whose arrays have a leading axis of n identical layers declares it with a static attribute
`stack_size = n`. PyTorch stores the same layers as a list, so one stacked layer here is n layers
there, with the index after the stack's name component:

    layers (stack_size 2) . attn . qkv_proj   ->   layers.0.attn.qkv_proj, layers.1.attn.qkv_proj

A dense layer that fuses several projections declares them with a static attribute `slices =
(("q_proj", 64), ("k_proj", 16), ("v_proj", 16))`: names and output columns, in order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from lora_flax.layers.adapter import Slice
from lora_flax.layers.trained_whole import SavedModule
from lora_flax.layers.wrappers import LoRAConv, LoRADense, LoRAEmbed, LoRALayer

# Attribute names, and integers for list members.
Path = tuple[Any, ...]


@dataclass(frozen=True)
class Layer:
    """A layer of a model that can be adapted, wrapped or not.

    Attributes:
        path: attribute names from the model to the layer (or to its wrapper).
        module: the plain layer, or the wrapper.
        wrapper: the class that wraps it.
        stack: sizes of the stacks that contain it, outermost first; empty for a single layer.
        names: its PyTorch names, one per stack member.
        kernel: shape of one member's weight.
        slices: the projections that it fuses, if it declares any.
    """

    path: Path
    module: nnx.Module
    wrapper: type[LoRALayer]
    stack: tuple[int, ...]
    names: tuple[str, ...]
    kernel: tuple[int, ...]
    slices: tuple[Slice, ...]

    @property
    def name(self) -> str:
        return dotted(self.path)

    @property
    def features_in(self) -> int:
        """Number of rows of the weight as a matrix."""
        return math.prod(self.kernel[:-1])

    @property
    def features_out(self) -> int:
        return self.kernel[-1]

    @property
    def whole(self) -> tuple[Slice, ...]:
        """All columns as one slice."""
        return (Slice("", 0, self.features_out),)

    def slice_name(self, name: str, part: Slice) -> str:
        """The name of a slice: `layers.0.attn.qkv_proj` and q_proj give `layers.0.attn.q_proj`."""
        return ".".join([*name.split(".")[:-1], part.name]) if part.name else name


def dotted(path: Path) -> str:
    """Converts `("layers", 0)` to `layers.0`."""
    return ".".join(str(part) for part in path)


def endings(name: str) -> list[str]:
    """All dotted suffixes: `a.b.c` gives `c`, `b.c`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def get(model: nnx.Module, path: Path) -> object:
    """The module or variable at the path."""
    node: object = model
    for part in path:
        # nnx.List and nnx.Dict store their members as attributes; plain containers do not.
        node = getattr(node, str(part)) if isinstance(node, nnx.Module) else node[part]  # type: ignore
    return node


def replace(model: nnx.Module, path: Path, module: nnx.Module) -> None:
    """Sets the module at the path, in place."""
    parent, part = get(model, path[:-1]), path[-1]
    if isinstance(parent, nnx.Module):
        setattr(parent, str(part), module)
    else:
        parent[part] = module  # type: ignore[index]


def wrappers(model: nnx.Module) -> list[tuple[Path, LoRALayer]]:
    """Every wrapper in the model, with its path."""
    return [(p, m) for p, m in nnx.iter_modules(model) if isinstance(m, LoRALayer)]


def saved_modules(model: nnx.Module) -> list[tuple[Path, SavedModule]]:
    """Every module that `modules_to_save` or `trainable_token_indices` wrapped, with its path."""
    return [(p, m) for p, m in nnx.iter_modules(model) if isinstance(m, SavedModule)]


def owners(model: nnx.Module) -> list[tuple[Path, LoRALayer | SavedModule]]:
    """Everything that has adapters, with its path."""
    return [(p, m) for p, m in nnx.iter_modules(model) if isinstance(m, (LoRALayer, SavedModule))]


def stacks(model: nnx.Module, path: Path) -> tuple[int | None, ...]:
    """The stack size of the model itself and of each module on the path (None: not a stack)."""
    sizes: list[int | None] = []
    for end in range(len(path) + 1):
        node = get(model, path[:end])
        node = node.base if isinstance(node, (LoRALayer, SavedModule)) else node
        size = getattr(node, "stack_size", None)
        sizes.append(size if isinstance(size, int) else None)
    return tuple(sizes)


def torch_names(path: Path, sizes: Iterable[int | None]) -> tuple[str, ...]:
    """A module's names in PyTorch; `sizes` as returned by `stacks`, in row-major order."""
    names: list[Path] = [()]
    for part, size in zip((None, *path), sizes, strict=True):
        if part is not None:
            names = [(*name, part) for name in names]
        if size is not None:
            names = [(*name, index) for name in names for index in range(size)]
    return tuple(dotted(name) for name in names)


def find_layers(model: nnx.Module) -> list[Layer]:
    """Every adaptable layer in the model, in the model's own order."""
    layers = []
    for path, module in modules(model):
        base = module.base if isinstance(module, LoRALayer) else module
        sizes = stacks(model, path)
        stack = tuple(size for size in sizes if size is not None)
        found = _kind(base, stack)
        if path and found is not None:
            wrapper, kernel = found
            names = torch_names(path, sizes)
            layers.append(
                Layer(path, module, wrapper, stack, names, kernel, _slices(base, kernel[-1]))
            )
    return layers


def modules(model: nnx.Module) -> list[tuple[Path, nnx.Module]]:
    """All modules, listing a wrapper in place of what it wraps and nothing below it."""
    inside = {path for path, _ in owners(model)}
    return [
        (path, module)
        for path, module in nnx.iter_modules(model)
        if not any(path[:end] in inside for end in range(len(path)))
    ]


def shortest_endings(
    model: nnx.Module, names: Collection[str], other_names: Collection[str] = ()
) -> list[str]:
    """The shortest suffixes that match the named layers and no other module, sorted."""
    wanted = set(names)
    others = {ending for name in other_names for ending in endings(name)}
    for path, _ in modules(model):
        for name in torch_names(path, stacks(model, path)):
            if name not in wanted:
                others.update(endings(name))
    return sorted({next((e for e in endings(n) if e not in others), n) for n in wanted})


def odd_kernels(model: nnx.Module) -> str:
    """Names the layers whose kernel has an unsupported shape."""
    known = {layer.path for layer in find_layers(model)}
    odd = [
        f"{dotted(path) or 'the model itself'} {list(shape)}"
        for path, module in modules(model)
        if path not in known and (shape := _shape(module, "kernel")) is not None
    ]
    if not odd:
        return ""
    rule = "not [in, out], nor stacked below a module with `stack_size`"
    return f" (passed over, {rule}: the kernel of {', '.join(odd)})"


def _kind(module: object, stack: tuple[int, ...]) -> tuple[type[LoRALayer], tuple[int, ...]] | None:
    """A layer's wrapper class and the shape of one member's weight; None if it is not a layer."""
    kernel, embedding = _shape(module, "kernel"), _shape(module, "embedding")
    window = getattr(module, "kernel_size", None)
    wrapper: type[LoRALayer]
    if kernel is not None and isinstance(window, tuple):
        wrapper, shape, rank = LoRAConv, kernel, len(window) + 2
    elif kernel is not None:
        wrapper, shape, rank = LoRADense, kernel, 2
    elif embedding is not None:
        wrapper, shape, rank = LoRAEmbed, embedding, 2
    else:
        return None
    if len(shape) != len(stack) + rank or shape[: len(stack)] != stack:
        return None
    return wrapper, shape[len(stack) :]


def _shape(module: object, name: str) -> tuple[int, ...] | None:
    shape = getattr(getattr(module, name, None), "shape", None)
    return tuple(shape) if isinstance(shape, tuple) and callable(module) else None


def _slices(module: object, features_out: int) -> tuple[Slice, ...]:
    slices, start = [], 0
    for name, size in getattr(module, "slices", ()):
        slices.append(Slice(name, start, size))
        start += size
    return tuple(slices) if start == features_out else ()
