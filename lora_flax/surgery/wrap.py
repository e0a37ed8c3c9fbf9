"""Surgery on a loaded model: adds updates to layers and removes them.

    wrap ──> merge ──> unmerge ──> unwrap          in place, and bitwise reversible
      └────────┴──> merge_and_unload               plain layers that include the update

Apart from rounding, none of these calls changes what the model computes; only training does.
Merging is in `lora_flax/surgery/merge.py`.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from lora_flax.config import DEFAULT, LoraConfig
from lora_flax.errors import LoraError, at_most_ten
from lora_flax.index import Layer, ModelIndex
from lora_flax.init.weights import groups, new_adapter
from lora_flax.layers.adapter import Spec
from lora_flax.layers.tied_head import LoRATiedHead
from lora_flax.layers.trained_whole import SavedModule, TrainedHead, TrainedTokens
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.summary import Report, report_on
from lora_flax.surgery.saved_modules import Undo, fit_tied_heads, insert_saved
from lora_flax.targets.matching import Target, select_targets


def wrap(
    model: nnx.Module,
    config: LoraConfig,
    rngs: nnx.Rngs | None = None,
    adapter_name: str = DEFAULT,
) -> Report:
    """Replaces the selected layers of `model`, in place, with wrappers that hold an adapter.

    Outputs are unchanged until the first training step. They match bitwise, except for rounding
    with `use_dora` and rank-1 starts that are nonzero, and except for `init_lora_weights=False`.

    Args:
        model: any NNX module. Layers are modules with a `kernel` `[in, out]` such as `nnx.Linear`,
            an `embedding` such as `nnx.Embed`, or a `kernel` and a `kernel_size` such as
            `nnx.Conv`; below a module with a static int attribute `stack_size`, arrays have a
            leading axis of that size.
        config: which layers to adapt, and how.
        rngs: used to initialize A, one key per layer; `nnx.Rngs(0)` if None.
        adapter_name: name of the adapter.

    Returns:
        What was wrapped, with parameter counts; `format_table` formats it for printing.

    Raises:
        LoraError: if the model is already wrapped (use `add_adapter` to add to it), a target
            matches nothing, or a rank exceeds the smaller side of a weight.
    """
    index = ModelIndex(model)
    if index.owners:
        raise LoraError("the model already has LoRA layers; use add_adapter, or unwrap it first")
    insert(index, config, rngs, adapter_name)
    return report_on(index)


def insert(index: ModelIndex, config: LoraConfig, rngs: nnx.Rngs | None, name: str) -> None:
    """Adds an adapter under an unused name and activates it.

    Everything is validated before the model is modified.

    Raises:
        LoraError: for the same reasons as `wrap`.
    """
    check_name(name)
    refuse_biases(index, config, name)
    only_saved = config.target_modules is None and bool(
        config.modules_to_save or config.trainable_token_indices
    )
    targets = [] if only_saved else select_targets(index, config)
    _refuse_ranks(targets)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    undo: list[Undo] = []
    try:
        undo += insert_saved(index, config, name)
        for target in targets:
            undo.append(add_to_layer(index, target.layer, target.spec, rngs.params(), name))
    except Exception:
        for step in reversed(undo):
            step()
        raise
    activate(index, (name,))


def check_name(name: object) -> None:
    """Raises LoraError if the name cannot be a module attribute, which `nnx.Dict` requires."""
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nnx.Dict, name):
        raise LoraError(
            f"an adapter name must be a Python identifier and not a dict method, got {name!r}"
        )


def refuse_biases(index: ModelIndex, config: LoraConfig, name: str) -> None:
    """Raises LoraError if two adapters would train the model's biases, as PEFT does.

    Trained biases are the base's own, so each adapter would change those of the other.
    """
    if config.bias == "none":
        return
    for layer in index.wrappers.values():
        for other in layer.adapters:
            if other != name and layer.adapters[other].spec.config.bias != "none":
                raise LoraError(
                    f"adapter {other!r} trains biases, which all adapters share, so adapter "
                    f"{name!r} cannot have bias={config.bias!r}; set bias to 'none'"
                )


def add_to_layer(index: ModelIndex, layer: Layer, spec: Spec, key: jax.Array, name: str) -> Undo:
    """Adds an adapter to a layer, wrapping it if plain; returns a function that undoes it."""
    there: Any = index.get(layer.path)  # may have been wrapped since the layer was selected
    if isinstance(there, SavedModule) and not there.adaptable:
        raise LoraError(f"{layer.name} cannot have an update and be trained in full or by tokens")
    if layer.wrapper is LoRATiedHead:
        _refuse_tokens(index, layer)
    wrapper = there if isinstance(there, LoRALayer) else layer.wrapper(there)
    wrapper.adapters[name] = new_adapter(layer, spec, wrapper.kernel, key)
    if wrapper is there:
        return lambda: delattr(wrapper.adapters, name)
    index.replace(layer.path, wrapper)
    return lambda: index.replace(layer.path, there)


def _refuse_tokens(index: ModelIndex, layer: Layer) -> None:
    for module in index.saved_modules.values():
        if getattr(module.plain, "tied_head", None) in layer.names:
            if isinstance(module, TrainedTokens | TrainedHead):
                raise LoraError(
                    f"{layer.name} is tied to an embedding: it cannot have an update while one of "
                    "them is trained by tokens, or the head in full"
                )


def activate(index: ModelIndex, names: tuple[str, ...]) -> None:
    """Makes these the adapters that compute and train."""
    for owner in index.owners.values():
        owner.active = names
    fit_tied_heads(index)


def unwrap(model: nnx.Module) -> None:
    """Removes all adapters and puts the original base layer objects back.

    A merged model is unmerged first. Weights are bitwise equal to those before `wrap`; biases
    trained with `bias="all"` or `"lora_only"` keep their trained values, as in PEFT.

    Raises:
        LoraError: if the model has no LoRA layers.
    """
    index = ModelIndex(model)
    refuse_plain(index)
    remove(index)


def remove(index: ModelIndex) -> None:
    """`unwrap` for an indexed model."""
    for path, owner in index.owners.items():
        if isinstance(owner, LoRALayer) and owner.merged:
            owner.unmerge()
        index.replace(path, owner.base)
    fit_tied_heads(index)


def refuse_plain(index: ModelIndex) -> None:
    """Raises LoraError if the model has no LoRA layers."""
    if not index.owners:
        raise LoraError(f"{type(index.model).__name__} has no LoRA layers; call wrap first")


def _refuse_ranks(targets: list[Target]) -> None:
    problems = []
    for layer, spec in ((target.layer, target.spec) for target in targets):
        for index, part in enumerate(spec.slices):
            largest = max(row[index] for row in spec.ranks)
            if largest > min(layer.features_in, part.size):
                where = layer.slice_name(layer.name, part)
                problems.append(
                    f"r={largest} exceeds the smaller side of {where} "
                    f"[{layer.features_in}, {part.size}]"
                )
        count = groups(layer)
        if any(rank % count for row in spec.ranks for rank in row):
            problems.append(f"the rank of {layer.name} must be divisible by its {count} groups")
        if count > 1 and len(set(spec.ranks)) > 1:
            problems.append(f"{layer.name} has groups, so all its layers must have the same rank")
    if problems:
        raise LoraError("; ".join(at_most_ten(problems)))
