"""Folds the updates into the base weights, reversibly or for good."""

from __future__ import annotations

from collections.abc import Iterable

from flax import nnx

from lora_flax.errors import LoraError
from lora_flax.index import ModelIndex
from lora_flax.layers.trained_whole import SavedModule
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.surgery.wrap import refuse_plain


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

    The original weights are dropped one layer at a time.

    Raises:
        LoraError: if the model has no LoRA layers, or an update cannot be merged into a weight.
    """
    index = ModelIndex(model)
    _refuse_merge(_wrappers(index))
    owners = index.owners
    for path in list(owners):
        owner = owners.pop(path)  # so that nothing holds the original weight after the replacement
        if isinstance(owner, SavedModule):
            index.replace(path, owner.folded())
            continue
        if not owner.merged:
            owner.merge()
        index.replace(path, owner.base)


def _wrappers(index: ModelIndex) -> list[LoRALayer]:
    refuse_plain(index)
    return list(index.wrappers.values())


def _refuse_merge(layers: Iterable[LoRALayer]) -> None:
    for layer in layers:
        for adapter in layer.in_use:
            layer.refuse_merge(adapter)
