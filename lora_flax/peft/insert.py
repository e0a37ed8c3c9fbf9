"""Turns the tensors of a PEFT file into an adapter, or into one message listing every problem."""

from __future__ import annotations

import jax
import numpy as np

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.host import on_host
from lora_flax.index import Layer, ModelIndex
from lora_flax.layers.adapter import Slice, Spec
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.peft.extras import PlainSlot, plain_slots
from lora_flax.peft.pairs import blank_pairs, cut_into_slices, fill, pair_tensors
from lora_flax.surgery.wrap import activate, add_to_layer, check_name, insert_saved
from lora_flax.targets.matching import Target, listing, make_spec, meant, refuse_shared
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
    targets = _targets(index, config, tensors)
    refuse_shared(index, [target.layer for target in targets])
    targets, tensors = _as_wrapped(index, config, targets, tensors, name)
    tensors = _without_base(targets, tensors, file)
    undo = insert_saved(index, config, name)
    slots: list[PlainSlot] = []
    try:
        new = [target for target in targets if target.layer.adapter(name) is None]
        for target in new:
            start = jax.random.key(0)
            undo.append(add_to_layer(index, target.layer, target.spec, start, name))
        slots = plain_slots(index, config.bias, name)
        _check(targets, slots, tensors, file)
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
        whole, parts = meant(layer, config)
        in_file = [name in modules for name in layer.names]
        parts = _parts_in_file(layer, parts, modules)
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
    """The targets, with the model's existing specs if it already has the adapter."""
    specs = {
        layer.path: adapter.spec
        for layer in index.layers
        if (adapter := layer.adapter(name)) is not None
    }
    if not specs:
        return targets, tensors
    first = next(iter(specs.values())).config
    problems = [
        f"{field} is {getattr(first, field)!r} in the model, {getattr(config, field)!r} in the "
        "adapter"
        for field in ("use_rslora", "use_dora", "lora_bias", "bias")
        if getattr(first, field) != getattr(config, field)
    ]
    result = []
    tensors = dict(tensors)
    for target in targets:
        layer = target.layer
        if layer.path not in specs:
            problems.append(f"{layer.name} is not wrapped in the model")
            continue
        spec = specs.pop(layer.path)
        if spec.slices != target.spec.slices:
            cut = cut_into_slices(layer, spec, tensors)
            if cut is None:
                problems.append(
                    f"{layer.name} has different slices in the model and in the adapter"
                )
                continue
            fused = tuple(f"{PREFIX}{member}.lora_" for member in layer.names)
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(fused)}
            tensors |= cut
        else:
            problems += _differences(layer, spec, target.spec)
        result.append(Target(layer, spec))
    problems += [f"the adapter has no tensors for {dotted(path)}" for path in specs]
    if problems:
        raise LoraError(f"the adapter does not fit the wrapped model: {'; '.join(problems)}")
    return result, tensors


def _differences(layer: Layer, here: Spec, there: Spec) -> list[str]:
    found = []
    for what, ours, theirs in (
        ("r", here.ranks, there.ranks),
        ("lora_alpha", here.alphas, there.alphas),
    ):
        if ours != theirs:
            a, b = (sorted({value for row in rows for value in row}) for rows in (ours, theirs))
            found.append(f"{what} of {layer.name} is {a} in the model, {b} in the adapter")
    return found


def _without_base(
    targets: list[Target], tensors: dict[str, np.ndarray], file: str
) -> dict[str, np.ndarray]:
    """Drops the weight of an adapted embedding or head if PEFT saved it unchanged."""
    tensors = dict(tensors)
    for layer in (target.layer for target in targets):
        base = layer.module.base if isinstance(layer.module, LoRALayer) else layer.module
        for name in layer.names if not layer.stack else ():
            key = f"{PREFIX}{name}.base_layer.weight"
            if key not in tensors:
                continue
            variable = getattr(base, layer.wrapper.kernel_name)[...]
            weight = on_host(variable).astype(np.float32)
            weight = weight.T if layer.wrapper.kernel_name == "kernel" else weight
            if tensors[key].shape != weight.shape or not np.allclose(tensors[key], weight, 1e-2):
                raise LoraError(
                    f"{file}: {key} differs from the base model's weight; an adapter trained "
                    "with a resized or changed embedding needs that base"
                )
            del tensors[key]
    return tensors


def _check(
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
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        problems.append(f"unexpected: {', '.join(unexpected)}")
    misshapen = [
        f"{key} is {list(tensors[key].shape)}, not {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in tensors and tensors[key].shape != shape
    ]
    if misshapen:
        problems.append(f"wrong shape: {', '.join(misshapen)}")
    if problems:
        raise LoraError(f"{file} does not fit the model; {'; '.join(problems)}")
