"""Folds the updates into the base weights, reversibly or for good."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flax import nnx

from lora_flax.errors import LoraError
from lora_flax.index import ModelIndex
from lora_flax.layers.tied_head import LoRATiedHead
from lora_flax.layers.trained_whole import (
    ReplacedBase,
    SavedModule,
    TrainedCopy,
    TrainedHead,
    TrainedTokens,
    UntiedEmbedding,
)
from lora_flax.layers.wrappers import LoRALayer, without_update
from lora_flax.surgery.wrap import refuse_plain
from lora_flax.targets.naming import Path


def merge(model: nnx.Module) -> None:
    """Adds the active updates to their base weights: `W + A B scale` in float32, cast back.

    Merged layers run at the cost of plain ones. The original weights are kept alongside the merged
    ones so that `unmerge` can restore them bitwise, which doubles the memory of the wrapped
    weights. `merge_and_unload` does not keep them.

    Raises:
        LoraError: if the model has no LoRA layers, is already merged, or has an update that cannot
            be merged into a weight; nothing is changed in that case.
    """
    layers = _wrappers(ModelIndex(model))
    if any(layer.merged for layer in layers):
        raise LoraError("the model is already merged; merging again would add the update twice")
    _refuse_merge(layers)
    for layer in layers:
        layer.merge()


def unmerge(model: nnx.Module) -> None:
    """Undoes `merge`: base weights are bitwise equal to those before it.

    Raises:
        LoraError: if the model is not merged; nothing is changed in that case.
    """
    layers = _wrappers(ModelIndex(model))
    if not all(layer.merged for layer in layers):
        raise LoraError("the model is not merged")
    for layer in layers:
        layer.unmerge()


def merge_and_unload(model: nnx.Module) -> None:
    """Merges and restores plain layers that include the update: the model to save or serve.

    The original weights are dropped one layer at a time. If an embedding and an output head that
    were tied differ afterwards, an `UntiedEmbedding` with both takes the embedding's place.

    Raises:
        LoraError: if the model has no LoRA layers, or an update cannot be merged into a weight.
    """
    index = ModelIndex(model)
    _refuse_merge(layer for layer in _wrappers(index) if not isinstance(layer, LoRATiedHead))
    heads = _untied_heads(index)
    owners = index.owners
    for path in list(owners):
        owner = owners.pop(path)  # so that nothing holds the original weight after the replacement
        if isinstance(owner, SavedModule | LoRATiedHead):
            index.replace(path, owner.folded() if isinstance(owner, SavedModule) else owner.base)
            continue
        if not owner.merged:
            owner.merge()
        index.replace(path, owner.base)
    for path, head in heads.items():
        index.replace(path, UntiedEmbedding(index.get(path), head))


def _untied_heads(index: ModelIndex) -> dict[Path, nnx.Module]:
    """What each tied head computes with, by the embedding's path, where that is not the embedding.

    As in PEFT, an update or a trained copy of an embedding leaves the head as it is, and an update
    of the head the embedding.
    """
    heads = {}
    updates = {
        index.names(path)[0]: module
        for path, module in index.wrappers.items()
        if isinstance(module, LoRATiedHead) and module.in_use
    }
    for path, module in index.modules.items():
        plain = module.plain if isinstance(module, LoRALayer | SavedModule) else module
        name = getattr(plain, "tied_head", None)
        if name is None:
            continue
        head, apart = _head(module)
        if name in updates:
            head, apart = updates[name].folded_into(head), True
        if apart:
            heads[path] = head
    return heads


def _head(module: Any) -> tuple[nnx.Module, bool]:
    """The embedding whose weight a tied head reads, and whether its calls give something else."""
    if isinstance(module, LoRALayer):
        head, apart = _head(without_update(module))
        return head, apart or bool(module.in_use)
    if isinstance(module, TrainedHead) and module.in_use is not None:
        return module.head, True
    if isinstance(module, TrainedHead | TrainedCopy):
        head, apart = _head(module.base)
        return head, apart or module.in_use is not None
    if isinstance(module, TrainedTokens) and module.in_use is not None:
        return module.folded(), False
    if isinstance(module, SavedModule):
        head, apart = _head(module.base)
        return (module.folded() if isinstance(module, ReplacedBase) else head), apart
    plain: nnx.Module = module
    return plain, False


def _wrappers(index: ModelIndex) -> list[LoRALayer]:
    refuse_plain(index)
    return list(index.wrappers.values())


def _refuse_merge(layers: Iterable[LoRALayer]) -> None:
    for layer in layers:
        for adapter in layer.in_use:
            layer.refuse_merge(adapter)
