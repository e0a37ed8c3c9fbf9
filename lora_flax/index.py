"""The module tree of a model, walked once: its layers, its wrappers, and their PyTorch names.

A module whose arrays have a leading axis of n identical layers declares it with a static attribute
`stack_size = n` (`lora_flax/targets/naming.py` says what PyTorch calls these layers).

A dense layer that fuses several projections declares them with a static attribute `slices =
(("q_proj", 64), ("k_proj", 16), ("v_proj", 16))`: names and output columns, in order.

An output head that reads an embedding's weight may be a module of its own; see
`lora_flax/layers/tied_head.py`.

Public functions index a model and pass the index on, but never store it: the model may change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from flax import nnx

from lora_flax.errors import LoraError
from lora_flax.layers.adapter import Adapter, Slice
from lora_flax.layers.kinds import kind_of, weight_shape
from lora_flax.layers.trained_whole import SavedModule
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.targets.naming import Path, dotted, torch_names

M = TypeVar("M", bound=nnx.Module)
Sizes = tuple[int | None, ...]
OWNERS = (LoRALayer, SavedModule)


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

    def adapter(self, name: str) -> Adapter | None:
        """The adapter of that name, if the layer is wrapped and has one."""
        adapters = self.module.adapters if isinstance(self.module, LoRALayer) else {}
        return adapters[name] if name in adapters else None


@dataclass(frozen=True)
class _Node:
    """A module of the tree.

    Attributes:
        module: the module.
        sizes: the stack size of the model and of each module down to this one; None for no stack.
        inside: whether it is below a wrapper or a saved module.
        layer: its `Layer`, if it can be adapted.
    """

    module: nnx.Module
    sizes: Sizes
    inside: bool
    layer: Layer | None


class ModelIndex:
    """What a model consists of, found in one walk.

    Mappings go from paths to modules in Flax's order: a module follows what it contains. They are
    snapshots: `replace` makes new ones, so a loop over one may call it.

    Args:
        model: any NNX module.

    Attributes:
        model: the model. Change it only through `replace`, or index it again.
    """

    def __init__(self, model: nnx.Module):
        self.model = model
        self._nodes: dict[Path, _Node] = {}
        # From each further path of a shared module to its first one.
        self._again: dict[Path, Path] = {}
        self._seen: dict[int, Path] = {}
        self._walk_all()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer that can be adapted; none below a wrapper or in a saved module."""
        return tuple(node.layer for node in self._nodes.values() if node.layer is not None)

    @property
    def modules(self) -> dict[Path, nnx.Module]:
        """All modules, a wrapper in place of what it wraps and nothing below it."""
        return {path: node.module for path, node in self._nodes.items() if not node.inside}

    @property
    def wrappers(self) -> dict[Path, LoRALayer]:
        """Every wrapped layer, including those inside modules that train in full."""
        return self.of_type(LoRALayer)

    @property
    def saved_modules(self) -> dict[Path, SavedModule]:
        """Every module that `modules_to_save` or `trainable_token_indices` wrapped."""
        return self.of_type(SavedModule)

    @property
    def owners(self) -> dict[Path, LoRALayer | SavedModule]:
        """Everything that has adapters."""
        return {
            path: node.module
            for path, node in self._nodes.items()
            if isinstance(node.module, OWNERS)
        }

    @property
    def shared(self) -> tuple[tuple[Path, ...], ...]:
        """The paths of each module found at more than one, the first being where it is listed."""
        found: dict[Path, list[Path]] = {}
        for path, first in self._again.items():
            found.setdefault(first, [first]).append(path)
        return tuple(tuple(paths) for paths in found.values())

    def of_type(self, kind: type[M]) -> dict[Path, M]:
        """Every module of a class, including those inside wrappers."""
        return {
            path: node.module for path, node in self._nodes.items() if isinstance(node.module, kind)
        }

    def get(self, path: Path) -> Any:
        """The module or variable at the path."""
        node: Any = self.model
        for part in path:
            # nnx.List and nnx.Dict store their members as attributes; plain containers do not.
            node = getattr(node, str(part)) if isinstance(node, nnx.Pytree) else node[part]
        return node

    def replace(self, path: Path, module: nnx.Module) -> None:
        """Sets the module at the path, in place, and indexes what is in it.

        Replacing a module by itself indexes what was added inside it.

        Raises:
            LoraError: if the module is a member of a tuple.
        """
        parent, part = self.get(path[:-1]), path[-1]
        if isinstance(parent, tuple):
            raise LoraError(f"{dotted(path)} is in a tuple, which is immutable; use an nnx.List")
        if isinstance(parent, LoRALayer) and part == "base":
            parent.set_base(module)
        elif isinstance(parent, nnx.Pytree):
            setattr(parent, str(part), module)
        else:
            parent[part] = module
        self._walk_below(self._outermost(path))

    def names(self, path: Path) -> tuple[str, ...]:
        """The PyTorch names of the module at the path, one per stack member."""
        path = self.place(path)
        return torch_names(path, self._sizes(path))

    def stack(self, path: Path) -> tuple[int, ...]:
        """Sizes of the stacks that contain the module at the path, outermost first."""
        return tuple(size for size in self._sizes(self.place(path)) if size is not None)

    def place(self, path: Path) -> Path:
        """The path without the wrappers around the module: that of the outermost one."""
        while path[-1:] == ("base",) and isinstance(self.get(path[:-1]), OWNERS):
            path = path[:-1]
        return path

    def odd_kernels(self) -> str:
        """Names the layers with an unsupported kernel."""
        known = {layer.path for layer in self.layers}
        odd = [
            f"{dotted(path) or 'the model itself'} {list(shape)}"
            for path, module in self.modules.items()
            if path not in known and (shape := weight_shape(module, "kernel")) is not None
        ]
        if not odd:
            return ""
        rule = "neither [in, out], nor nnx.Conv's, nor stacked below a module with `stack_size`"
        return f" (skipped because {rule}: the kernel of {', '.join(odd)})"

    def _sizes(self, path: Path) -> Sizes:
        if not path or path in self._nodes:
            return self._nodes[path].sizes
        return (*self._sizes(path[:-1]), None)  # a plain container, or a variable

    def _outermost(self, path: Path) -> Path:
        """The path of the wrapper that the path is in, or the path itself."""
        for end in range(len(path)):
            node = self._nodes.get(path[:end])
            if node is not None and isinstance(node.module, OWNERS):
                return path[:end]
        return path

    def _walk_all(self) -> None:
        walk = _Walk({})
        walk.visit(self.model, ())
        self._nodes, self._again, self._seen = walk.nodes, walk.again, walk.seen

    def _walk_below(self, start: Path) -> None:
        """Repeats the walk at and below a path."""
        old = [path for path in self._nodes if path[: len(start)] == start]
        ends = [path for pair in self._again.items() for path in pair]
        if old and not any(path[: len(start)] == start for path in ends):
            for path in old:
                del self._seen[id(self._nodes[path].module)]
            walk = _Walk(self._seen)
            walk.visit(self.get(start), start, self._sizes(start[:-1]))
            if not walk.again:
                # A module follows what it contains, so the old ones are next to each other.
                items = list(self._nodes.items())
                first = list(self._nodes).index(old[0])
                last = first + len(old)
                self._nodes = dict([*items[:first], *walk.nodes.items(), *items[last:]])
                return
        # A shared module is listed at the first of its paths, which may have changed.
        self._walk_all()


class _Walk:
    """One walk over a tree or a part of it.

    Attributes:
        nodes: what it found, each module after what it contains.
        again: from each further path of a module to the path where it was found first.
        seen: the path of each module, by id.
    """

    def __init__(self, seen: dict[int, Path]):
        self.nodes: dict[Path, _Node] = {}
        self.again: dict[Path, Path] = {}
        self.seen = seen

    def visit(self, node: object, path: Path, above: Sizes = (), inside: bool = False) -> None:
        """Records what is at and below a path, where `above` are the sizes of the modules above."""
        if isinstance(node, nnx.Module):
            if id(node) in self.seen:
                self.again[path] = self.seen[id(node)]
                return
            self.seen[id(node)] = path
        base: Any = node
        while isinstance(base, OWNERS):
            base = base.base
        size = getattr(base, "stack_size", None)
        sizes = (*above, size if isinstance(size, int) else None)
        for part, child in _children(node):
            self.visit(child, (*path, part), sizes, inside or base is not node)
        if isinstance(node, nnx.Module):
            layer = None if inside or not path else _layer(path, node, sizes)
            self.nodes[path] = _Node(node, sizes, inside, layer)


def _children(node: object) -> Iterator[tuple[Any, object]]:
    """What a module or a container holds, in Flax's order, in graph mode and in tree mode."""
    if isinstance(node, nnx.List):
        named = (
            (int(name) if name.isdigit() else name, child) for name, child in vars(node).items()
        )
        yield from sorted(named, key=lambda item: (isinstance(item[0], str), item[0]))
    elif isinstance(node, nnx.Pytree):
        yield from sorted(vars(node).items())
    elif not isinstance(node, nnx.Variable):
        children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)
        for keys, child in children:
            for key in keys:  # none for a leaf
                yield getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))), child


def _layer(path: Path, module: nnx.Module, sizes: Sizes) -> Layer | None:
    """The `Layer` of a module, plain or wrapped; None if it cannot be adapted."""
    base = module.base if isinstance(module, LoRALayer) else module
    if isinstance(base, SavedModule):
        if not base.adaptable:
            return None
        base = base.plain
    stack = tuple(size for size in sizes if size is not None)
    found = kind_of(base, stack)
    if found is None:
        return None
    wrapper, kernel = found
    slices = _slices(base, kernel[-1])
    return Layer(path, module, wrapper, stack, torch_names(path, sizes), kernel, slices)


def _slices(module: object, features_out: int) -> tuple[Slice, ...]:
    slices, start = [], 0
    for name, size in getattr(module, "slices", ()):
        slices.append(Slice(name, start, size))
        start += size
    return tuple(slices) if start == features_out else ()
