"""What a PEFT file contains besides A and B: biases, full modules, embedding rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from lora_flax.config import Bias
from lora_flax.host import on_host, place_like
from lora_flax.index import ModelIndex
from lora_flax.layers.trained_whole import (
    ReplacedBase,
    TokenRows,
    TrainedCopy,
    TrainedHead,
    TrainedTokens,
)
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.targets.naming import PREFIX, TORCH_PARAMETERS, Path


@dataclass(frozen=True)
class PlainSlot:
    """One variable of the wrapped model and its tensors in the file, one per stack member.

    Attributes:
        path: path of the variable.
        keys: the tensors' keys in the file.
        shape: shape of one tensor in the model.
        transposed: whether PyTorch puts the last axis first and the window's axes last.
        members: the stack members that the keys belong to; None for all.
    """

    path: Path
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    members: tuple[int, ...] | None = None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the file."""
        return self._to_torch(np.zeros(self.shape)).shape

    def tensors(self, index: ModelIndex) -> dict[str, np.ndarray]:
        """The tensors as written to the file, float32."""
        variable = _before_merge(index, self.path, self._variable(index))
        value = on_host(variable.get_value()).astype(np.float32)
        members = value.reshape(-1, *self.shape)
        if self.members is not None:
            members = members[list(self.members)]
        return {
            key: np.ascontiguousarray(self._to_torch(member))
            for key, member in zip(self.keys, members, strict=True)
        }

    def put(self, index: ModelIndex, tensors: dict[str, np.ndarray]) -> None:
        """Copies the file's tensors into the model."""
        variable = self._variable(index)
        old = variable.get_value()
        parts = np.stack([self._from_torch(tensors[key]) for key in self.keys])
        if self.members is not None:
            value = on_host(old).copy().reshape(-1, *self.shape)
            value[list(self.members)] = parts
            parts = value
        variable.set_value(place_like(old, parts.reshape(old.shape).astype(old.dtype)))

    def _variable(self, index: ModelIndex) -> nnx.Variable[Any]:
        variable = index.get(self.path)
        assert isinstance(variable, nnx.Variable)
        return variable

    def _to_torch(self, array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, (-1, -2), (0, 1)) if self.transposed else array

    def _from_torch(self, array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, (0, 1), (-1, -2)) if self.transposed else array


def _before_merge(index: ModelIndex, path: Path, variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
    """The variable that holds the value without updates, if a wrapper above merged them in."""
    for end in range(len(path)):
        layer = index.get(path[:end])
        if not isinstance(layer, LoRALayer) or not layer.merged:
            continue
        if variable is layer.kernel:
            return layer.base_kernel
        if layer.unmerged_bias is not None and variable is layer.plain.bias:
            return layer.unmerged_bias
    return variable


# What PEFT's wrappers call the module that they wrap.
_BASE_NAMES: dict[type, str] = {
    TrainedCopy: "original_module.",
    TrainedTokens: "token_adapter.base_layer.",
}
BASE_NAMES = ("", "base_layer.", *_BASE_NAMES.values())


def plain_slots(index: ModelIndex, bias: Bias, name: str) -> list[PlainSlot]:
    """All slots of what trains for one adapter of a wrapped model, besides A and B."""
    slots = _bias_slots(index, bias) if bias != "none" else []
    for path, module in index.saved_modules.items():
        if name not in module.adapters or isinstance(module, ReplacedBase):
            continue
        trained, names = module.adapters[name], trained_names(index, path, name)
        prefixes = [PREFIX + n for n in names]
        if isinstance(trained, TokenRows):
            keys = tuple(f"{p}.token_adapter.trainable_tokens_delta" for p in prefixes)
            shape = tuple(trained.rows[...].shape)
            slots.append(PlainSlot((*path, "adapters", name, "rows"), keys, shape, False))
            continue
        members = None
        if len(names) < len(index.names(path)):
            members = tuple(i for i, n in enumerate(index.names(path)) if n in names)
        lead = len(index.stack(path))
        slots += _copy_slots(trained, (*path, "adapters", name), prefixes, lead, members)
    return slots


def trained_names(index: ModelIndex, path: Path, name: str) -> tuple[str, ...]:
    """The PyTorch names of the modules that an adapter trains at a path, in full or by tokens."""
    module = index.saved_modules[path]
    if isinstance(module, TrainedHead):
        return (module.plain.tied_head,)
    names = index.names(path)
    if isinstance(module, TrainedCopy) and (chosen := module.chosen(name)) is not None:
        names = tuple(n for n, on in zip(names, chosen, strict=True) if on)
    return names


def replaced_slots(index: ModelIndex, name: str) -> list[PlainSlot]:
    """Slots of the base weights that an adapter's file replaced."""
    slots = []
    for path, module in index.saved_modules.items():
        if not isinstance(module, ReplacedBase) or name not in module.adapters:
            continue
        copy, place = module.adapters[name], index.place(path)
        kind = "kernel" if hasattr(copy, "kernel") else "embedding"
        above = [index.get(path[:end]) for end in range(len(place), len(path))]
        inside = next((_BASE_NAMES[type(m)] for m in above if type(m) in _BASE_NAMES), "")
        ending = "base_layer." if any(isinstance(m, LoRALayer) for m in above) else inside
        keys = tuple(f"{PREFIX}{n}.{ending}weight" for n in index.names(path))
        shape = tuple(getattr(copy, kind)[...].shape)
        where = (*path, "adapters", name, kind)
        slots.append(PlainSlot(where, keys, shape, transposed=kind == "kernel"))
    return slots


def _copy_slots(
    module: nnx.Module,
    path: Path,
    prefixes: list[str],
    lead: int,
    members: tuple[int, ...] | None,
) -> list[PlainSlot]:
    slots = []
    for inner, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        *modules, last = map(str, inner)
        below = ".".join([*modules, TORCH_PARAMETERS.get(last, last)])
        keys = tuple(f"{prefix}.{below}" for prefix in prefixes)
        shape = tuple(variable.get_value().shape)[lead:]
        transposed = inner[-1] == "kernel"
        slots.append(PlainSlot((*path, *inner), keys, shape, transposed, members))
    return slots


def _bias_slots(index: ModelIndex, bias: Bias) -> list[PlainSlot]:
    owners, saved = index.wrappers, index.saved_modules
    layers = {layer.path for layer in index.layers}
    slots = []
    for path, variable in nnx.to_flat_state(nnx.state(index.model, nnx.Param)):
        if path[-1] != "bias" or any(path[:end] in saved for end in range(len(path))):
            continue
        inside = path[-2:-1] == ("base",) and path[:-2] in owners
        owner = path[:-2] if inside else path[:-1]
        if not inside and bias == "lora_only":
            continue
        shape = tuple(variable.get_value().shape)[len(index.stack(owner)) :]
        ending = "base_layer.bias" if owner in owners and owner in layers else "bias"
        keys = tuple(f"{PREFIX}{n}.{ending}" for n in index.names(owner))
        slots.append(PlainSlot(path, keys, shape, transposed=False))
    return slots
