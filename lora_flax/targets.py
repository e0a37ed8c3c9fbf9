"""Finding the layers that a config means, under the names that PyTorch would give them.

A module whose arrays carry a leading axis of n equal layers says so with a static attribute
`stack_size = n`. PyTorch holds the same layers as a list, so one stacked layer here is n layers
there, and the index stands behind the component that is the stack:

    layers (stack_size 2) . attn . qkv_proj   ->   layers.0.attn.qkv_proj, layers.1.attn.qkv_proj
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from lora_flax.config import ALL_LINEAR
from lora_flax.errors import LoraError
from lora_flax.layers import LoRADense, kernel_shape

# Attribute names, and integers for the members of a list.
Path = tuple[Any, ...]

# PEFT leaves out the output embedding of a transformers model; this is its usual name.
OUTPUT_HEAD = "lm_head"


@dataclass(frozen=True)
class Layer:
    """A dense layer of a model, wrapped or not.

    Attributes:
        path: attribute names from the model to the layer (or to its wrapper).
        module: the plain layer, or the wrapper.
        stack: sizes of the stacks that it lies in, outermost first; empty for a single layer.
        names: its PyTorch names, one for each member of the stack.
    """

    path: Path
    module: nnx.Module
    stack: tuple[int, ...]
    names: tuple[str, ...]
    features_in: int
    features_out: int

    @property
    def name(self) -> str:
        return dotted(self.path)


def dotted(path: Path) -> str:
    """`("layers", 0)` as `layers.0`."""
    return ".".join(str(part) for part in path)


def get(model: nnx.Module, path: Path) -> object:
    """What stands at the path: a module, or a variable."""
    node: object = model
    for part in path:
        # nnx.List and nnx.Dict hold their members as attributes; plain containers do not.
        node = getattr(node, str(part)) if isinstance(node, nnx.Module) else node[part]  # type: ignore
    return node


def replace(model: nnx.Module, path: Path, module: nnx.Module) -> None:
    """Puts a module at the path, in place."""
    parent, part = get(model, path[:-1]), path[-1]
    if isinstance(parent, nnx.Module):
        setattr(parent, str(part), module)
    else:
        parent[part] = module  # type: ignore[index]


def wrappers(model: nnx.Module) -> list[tuple[Path, LoRADense]]:
    """Every wrapper of the model with its path."""
    return [(p, m) for p, m in nnx.iter_modules(model) if isinstance(m, LoRADense)]


def stacks(model: nnx.Module, path: Path) -> tuple[int | None, ...]:
    """The stack size of the model itself and of each module on the path (None: not a stack)."""
    sizes: list[int | None] = []
    for end in range(len(path) + 1):
        node = get(model, path[:end])
        node = node.base if isinstance(node, LoRADense) else node
        size = getattr(node, "stack_size", None)
        sizes.append(size if isinstance(size, int) else None)
    return tuple(sizes)


def torch_names(path: Path, sizes: Iterable[int | None]) -> tuple[str, ...]:
    """The names of a module in PyTorch; `sizes` as `stacks` gives them, in row-major order."""
    names: list[Path] = [()]
    for part, size in zip((None, *path), sizes, strict=True):
        if part is not None:
            names = [(*name, part) for name in names]
        if size is not None:
            names = [(*name, index) for name in names for index in range(size)]
    return tuple(dotted(name) for name in names)


def find_layers(model: nnx.Module) -> list[Layer]:
    """Every dense layer below the model, wrapped ones included, in the model's own order."""
    layers = []
    for path, module in _modules(model):
        shape = kernel_shape(module.base if isinstance(module, LoRADense) else module)
        if not path or shape is None:
            continue
        sizes = stacks(model, path)
        stack = tuple(size for size in sizes if size is not None)
        if len(shape) == len(stack) + 2 and shape[: len(stack)] == stack:
            names = torch_names(path, sizes)
            layers.append(Layer(path, module, stack, names, *shape[-2:]))
    return layers


def select_layers(
    model: nnx.Module,
    target_modules: str | Collection[str] | None,
    *,
    ignore_unmatched: bool = False,
) -> list[Layer]:
    """The layers that `target_modules` means, by PEFT's rules (see `LoraConfig`).

    Args:
        ignore_unmatched: let names that match nothing pass if others match, as PEFT does.

    Raises:
        LoraError: listing each target that matched nothing and the layers there are; for a target
            that means only some members of a stack; for a layer that stands at two paths.
    """
    layers = find_layers(model)
    if not layers:
        raise LoraError(f"{type(model).__name__} has no dense layer{_odd_kernels(model)}")
    if target_modules is None:
        raise LoraError(f"target_modules is not set; this model has {_listing(layers)}")
    if isinstance(target_modules, str):
        chosen = _match_string(layers, target_modules)
        if not chosen:
            raise LoraError(
                f"target_modules {target_modules!r} matched no layer; a string is {ALL_LINEAR!r} or"
                f" a regular expression for a whole name (one is {layers[0].names[0]!r}), a list "
                f"holds endings of names; this model has {_listing(layers)}{_odd_kernels(model)}"
            )
    else:
        chosen, unmatched = _match_names(layers, target_modules)
        if not chosen or (unmatched and not ignore_unmatched):
            raise LoraError(
                f"target_modules {unmatched} matched no layer; this model has "
                f"{_listing(layers)}{_odd_kernels(model)}"
            )
    _refuse_shared(model, chosen)
    return chosen


def exact_targets(model: nnx.Module, chosen: Collection[Layer]) -> list[str]:
    """The shortest endings of names that mean the chosen layers and no other module, sorted."""
    paths = {layer.path for layer in chosen}
    others: set[str] = set()
    for path, _ in _modules(model):
        if path not in paths:
            for name in torch_names(path, stacks(model, path)):
                others.update(_endings(name))
    targets = set()
    for name in (name for layer in chosen for name in layer.names):
        targets.add(next((e for e in _endings(name) if e not in others), name))
    return sorted(targets)


def _modules(model: nnx.Module) -> list[tuple[Path, nnx.Module]]:
    """All modules, a wrapper standing for what it wraps."""
    inside = {path for path, _ in wrappers(model)}
    return [
        (path, module)
        for path, module in nnx.iter_modules(model)
        if not any(path[:end] in inside for end in range(len(path)))
    ]


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _match_string(layers: list[Layer], target: str) -> list[Layer]:
    if target.lower() == ALL_LINEAR:
        return [layer for layer in layers if layer.path[-1] != OUTPUT_HEAD]
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise LoraError(
            f"target_modules {target!r} is not a regular expression: {error}"
        ) from error
    return [
        layer
        for layer in layers
        if pattern.fullmatch(layer.name)
        or _whole_stack(layer, [pattern.fullmatch(name) is not None for name in layer.names])
    ]


def _match_names(layers: list[Layer], targets: Collection[str]) -> tuple[list[Layer], list[str]]:
    wanted, chosen = set(targets), []
    used: set[str] = set()
    for layer in layers:
        path_hits = wanted.intersection(_endings(layer.name))
        name_hits = [wanted.intersection(_endings(name)) for name in layer.names]
        if path_hits or _whole_stack(layer, [bool(hits) for hits in name_hits]):
            chosen.append(layer)
            used.update(path_hits, *name_hits)
    return chosen, sorted(wanted - used)


def _whole_stack(layer: Layer, hits: list[bool]) -> bool:
    if any(hits) and not all(hits):
        raise LoraError(
            f"target_modules means {sum(hits)} of the {len(hits)} layers stacked in {layer.name}; "
            "a stack is adapted as a whole"
        )
    return all(hits)


def _refuse_shared(model: nnx.Module, chosen: list[Layer]) -> None:
    paths = {layer.path for layer in chosen}
    for same in nnx.find_duplicates(model, only=nnx.Module):
        if paths.intersection(same):
            raise LoraError(
                f"one layer stands at {' and '.join(dotted(path) for path in same)}; wrapping one "
                "place would part the two"
            )


def _listing(layers: list[Layer]) -> str:
    return ", ".join(dict.fromkeys(str(layer.path[-1]) for layer in layers))


def _odd_kernels(model: nnx.Module) -> str:
    """Names the layers whose kernel has another rank than that of a dense layer."""
    dense = {layer.path for layer in find_layers(model)}
    odd = [
        f"{dotted(path) or 'the model itself'} {list(shape)}"
        for path, module in _modules(model)
        if path not in dense and (shape := kernel_shape(module)) is not None
    ]
    if not odd:
        return ""
    rule = "not [in, out], nor stacked below a module with `stack_size`"
    return f" (passed over, {rule}: the kernel of {', '.join(odd)})"
