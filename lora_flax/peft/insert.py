"""Turns the tensors of a PEFT file into an adapter, or into one message listing every problem."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError, at_most_ten
from lora_flax.index import Layer, ModelIndex
from lora_flax.layers.adapter import Slice, Spec
from lora_flax.peft.base_weights import take_base_weights
from lora_flax.peft.extras import PlainSlot, plain_slots
from lora_flax.peft.padding import drop_padding
from lora_flax.peft.pairs import blank_pairs, cut_into_slices, fill, pair_tensors
from lora_flax.surgery.saved_modules import Undo, insert_saved
from lora_flax.surgery.wrap import activate, add_to_layer, check_name, refuse_biases
from lora_flax.targets.matching import (
    Target,
    listing,
    make_spec,
    meant,
    named_slices,
    refuse_shared,
    tied_hint,
)
from lora_flax.targets.naming import PREFIX, dotted


def insert_tensors(
    index: ModelIndex, config: LoraConfig, tensors: dict[str, np.ndarray], name: str, file: str
) -> None:
    """Adds or replaces an adapter.

    Args:
        index: of a model that is plain or wrapped, not merged.
        config: the file's config.
        tensors: float32, by their keys in the file.
        name: name of the adapter in the model.
        file: used in messages.

    Raises:
        LoraError: naming what is missing, unexpected or misshapen; the model is then unchanged.
    """
    check_name(name)
    refuse_biases(index, config, name)
    undo: list[Undo] = []
    slots: list[PlainSlot] = []
    try:
        tensors = take_base_weights(index, config, tensors, name, undo)
        targets = _targets(index, config, tensors)
        refuse_shared(index, [target.layer for target in targets])
        targets, tensors = _as_wrapped(index, config, targets, tensors, name)
        undo += insert_saved(index, config, name)
        new = [target for target in targets if target.layer.adapter(name) is None]
        for target in new:
            start = jax.random.key(0)
            undo.append(add_to_layer(index, target.layer, target.spec, start, name))
        slots = plain_slots(index, config.bias, name)
        _check(index, targets, slots, tensors, file)
    except Exception:
        for step in reversed(undo):
            step()
        raise
    chosen = {target.layer.path for target in targets}
    for layer in index.layers:
        adapter = layer.adapter(name)
        if layer.path in chosen and adapter is not None:
            fill(layer, adapter, tensors)
    for slot in slots:
        slot.put(index, tensors)
    activate(index, (name,))


def _targets(index: ModelIndex, config: LoraConfig, tensors: dict[str, np.ndarray]) -> list[Target]:
    """The layers that the config selects, whole or in slices depending on the file."""
    if config.target_modules is None:
        return []
    modules = {key[len(PREFIX) :].split(".lora_", 1)[0] for key in tensors if ".lora_" in key}
    targets = []
    for layer in index.layers:
        whole, _ = meant(layer, config)
        in_file = [name in modules for name in layer.names]
        parts = _parts_in_file(layer, named_slices(layer, config), modules)
        chosen: dict[Slice, list[bool]] = {}
        if parts and not any(in_file):
            chosen = parts
        elif any(whole):
            chosen = {layer.whole[0]: whole}
        if chosen:
            targets.append(Target(layer, make_spec(layer, config, chosen)))
    if not targets and not config.modules_to_save and not config.trainable_token_indices:
        raise LoraError(
            f"the adapter's target_modules {config.target_modules!r} matched no layer; this model "
            f"has {listing(index.layers)}"
        )
    return targets


def _parts_in_file(
    layer: Layer, parts: dict[Slice, list[bool]], modules: set[str]
) -> dict[Slice, list[bool]]:
    """PEFT ignores names that match nothing: slices count only if the file has one of them."""
    names = {layer.slice_name(name, part) for part in parts for name in layer.names}
    return parts if names & modules else {}


def _as_wrapped(
    index: ModelIndex,
    config: LoraConfig,
    targets: list[Target],
    tensors: dict[str, np.ndarray],
    name: str,
) -> tuple[list[Target], dict[str, np.ndarray]]:
    """The targets and tensors without padding, with the specs that the model already has."""
    specs = {
        layer.path: adapter.spec
        for layer in index.layers
        if (adapter := layer.adapter(name)) is not None
    }
    result = []
    if not specs:
        for target in targets:
            target, tensors = drop_padding(target, tensors, None)
            result.append(target)
        return result, tensors
    first = next(iter(specs.values())).config
    problems = [
        f"{field} is {getattr(first, field)!r} in the model, {getattr(config, field)!r} in the "
        "adapter"
        for field in ("use_dora", "lora_bias", "bias")
        if getattr(first, field) != getattr(config, field)
    ]
    tensors = dict(tensors)
    for target in targets:
        layer = target.layer
        if layer.path not in specs:
            problems.append(f"{layer.name} is not wrapped in the model")
            continue
        spec = specs.pop(layer.path)
        if spec.slices != target.spec.slices:
            cut = cut_into_slices(layer, spec, target.spec, tensors)
            if cut is None:
                problems.append(
                    f"{layer.name} has different slices in the model and in the adapter"
                )
                continue
            fused = tuple(f"{PREFIX}{member}.lora_" for member in layer.names)
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(fused)}
            tensors |= cut
        else:
            target, tensors = drop_padding(target, tensors, spec)
            problems += _differences(layer, spec, target.spec)
        result.append(Target(layer, spec))
    problems += [f"the adapter has no tensors for {dotted(path)}" for path in specs]
    if problems:
        raise LoraError(f"the adapter does not fit the wrapped model: {'; '.join(problems)}")
    return result, tensors


def _differences(layer: Layer, here: Spec, there: Spec) -> list[str]:
    """Ranks, and what makes the scales differ: rsLoRA may be written as plain LoRA."""

    def say(what: str, ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> str:
        a, b = (sorted({value for row in rows for value in row}) for rows in (ours, theirs))
        return f"{what} of {layer.name} is {a} in the model, {b} in the adapter"

    found = [say("r", here.ranks, there.ranks)] if here.ranks != there.ranks else []
    if np.allclose(here.scales(), there.scales(), rtol=1e-6, atol=0):
        return found
    if here.alphas != there.alphas:
        found.append(say("lora_alpha", here.alphas, there.alphas))
    if here.config.use_rslora != there.config.use_rslora:
        found.append(
            f"use_rslora is {here.config.use_rslora} in the model, {there.config.use_rslora} in "
            f"the adapter, for {layer.name}"
        )
    return found


def _check(
    index: ModelIndex,
    targets: list[Target],
    slots: list[PlainSlot],
    tensors: dict[str, np.ndarray],
    file: str,
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for target in targets:
        for pair in blank_pairs(target.layer, target.spec):
            for key, tensor in pair_tensors(target.layer, pair).items():
                expected[key] = tensor.shape
    for slot in slots:
        expected |= dict.fromkeys(slot.keys, slot.torch_shape)
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing: {', '.join(at_most_ten(missing))}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        updates = [key[len(PREFIX) :].split(".lora_")[0] for key in unexpected if ".lora_" in key]
        named = ", ".join(at_most_ten(unexpected))
        problems.append(f"unexpected: {named}{tied_hint(index, updates)}")
    misshapen = [
        f"{key} is {list(tensors[key].shape)}, not {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in tensors and tensors[key].shape != shape
    ]
    if misshapen:
        problems.append(f"wrong shape: {', '.join(at_most_ten(misshapen))}")
    if problems:
        raise LoraError(f"{file} does not fit the model; {'; '.join(problems)}")
