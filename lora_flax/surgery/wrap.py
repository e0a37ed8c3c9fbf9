"""Surgery on a loaded model: add the update, merge it in, take it out.

    wrap ──> merge ──> unmerge ──> unwrap          in place, and bitwise reversible
      └────────┴──> merge_and_unload               plain layers that include the update

Apart from rounding, none of these calls changes what the model computes; only training does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.index import (
    Layer,
    Path,
    dotted,
    find_layers,
    get,
    modules,
    owners,
    replace,
    stacks,
    torch_names,
)
from lora_flax.init.weights import groups, new_adapter
from lora_flax.layers.adapter import Spec
from lora_flax.layers.trained_whole import SavedModule, TrainedCopy, TrainedTokens
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.summary import Report, report
from lora_flax.targets.matching import Target, listing, matches, select_targets

Undo = Callable[[], None]
DEFAULT = "default"
# The module that a plain list in trainable_token_indices refers to, as in PEFT.
INPUT_EMBEDDING = "embed_tokens"


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
    if is_wrapped(model):
        raise LoraError("the model has LoRA layers already; use add_adapter, or unwrap it first")
    insert(model, config, rngs, adapter_name)
    return report(model)


def is_wrapped(model: nnx.Module) -> bool:
    """Whether the model has an adapter."""
    return bool(owners(model))


def insert(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs | None, name: str) -> None:
    """Adds an adapter under an unused name and activates it.

    Everything is validated before the model is modified.

    Raises:
        LoraError: for the same reasons as `wrap`.
    """
    check_name(name)
    only_saved = config.target_modules is None and bool(
        config.modules_to_save or config.trainable_token_indices
    )
    targets = [] if only_saved else select_targets(model, config)
    _refuse_ranks(targets)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    undo: list[Undo] = []
    try:
        undo += insert_saved(model, config, name)
        for target in targets:
            undo.append(add_to_layer(model, target.layer, target.spec, rngs.params(), name))
    except Exception:
        for step in reversed(undo):
            step()
        raise
    activate(model, (name,))


def check_name(name: object) -> None:
    """Raises LoraError if the name cannot be a module attribute, which `nnx.Dict` requires."""
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nnx.Dict, name):
        raise LoraError(
            f"an adapter's name must be a Python identifier and no method of dict, not {name!r}"
        )


def add_to_layer(model: nnx.Module, layer: Layer, spec: Spec, key: jax.Array, name: str) -> Undo:
    """Adds an adapter to a layer, wrapping it if plain; returns a function that undoes it."""
    there = layer.module
    wrapper = there if isinstance(there, LoRALayer) else layer.wrapper(there)
    wrapper.adapters[name] = new_adapter(layer, spec, wrapper.kernel, key)
    if wrapper is there:
        return lambda: delattr(wrapper.adapters, name)
    replace(model, layer.path, wrapper)
    return lambda: replace(model, layer.path, there)


def insert_saved(model: nnx.Module, config: LoraConfig, name: str) -> list[Undo]:
    """Adds the modules and rows that train in full; returns functions that undo it.

    Raises:
        LoraError: if a name matches nothing, or a token is not in the embedding.
    """
    undo: list[Undo] = []
    wanted: list[tuple[Path, type[SavedModule], tuple[Any, ...]]] = [
        *((path, TrainedCopy, ()) for path in _saved_paths(model, config)),
        *((path, TrainedTokens, (ids,)) for path, ids in _token_paths(model, config).items()),
    ]
    try:
        for path, kind, arguments in wanted:
            before = get(model, path)
            module = _saved_at(model, path, kind)
            undo.append(_putting_back(model, path, before, module, name))
            module.add(name, *arguments)
    except Exception:
        for step in reversed(undo):
            step()
        raise
    return undo


def _putting_back(
    model: nnx.Module, path: Path, before: Any, module: SavedModule, name: str
) -> Undo:
    old = module.adapters[name] if name in module.adapters else None

    def put_back() -> None:
        if before is not module:
            replace(model, path, before)
        elif old is not None:
            module.adapters[name] = old
        elif name in module.adapters:
            del module.adapters[name]

    return put_back


def activate(model: nnx.Module, names: tuple[str, ...]) -> None:
    """Makes these the adapters that compute and train."""
    for _, owner in owners(model):
        owner.active = names


def unwrap(model: nnx.Module) -> None:
    """Removes all adapters and puts the original base layer objects back.

    A merged model is unmerged first. Weights are bitwise equal to those before `wrap`; biases
    trained with `bias="all"` or `"lora_only"` keep their trained values, as in PEFT.

    Raises:
        LoraError: if the model has no LoRA layers.
    """
    for path, layer in _wrapped(model):
        if isinstance(layer, LoRALayer) and layer.merged:
            layer.unmerge()
        replace(model, path, layer.base)


def merge(model: nnx.Module) -> None:
    """Adds the active updates to their base weights: `W + A B scale` in float32, cast back.

    Merged layers run at the cost of plain ones. The original weights are kept alongside the merged
    ones so that `unmerge` can restore them bitwise, which doubles the memory of the wrapped
    weights. `merge_and_unload` does not keep them.

    Raises:
        LoraError: if the model has no LoRA layers, is already merged, or has an update that cannot
            be merged into a weight; nothing is changed in that case.
    """
    layers = [layer for _, layer in _wrapped(model) if isinstance(layer, LoRALayer)]
    if any(layer.merged for layer in layers):
        raise LoraError("the model is merged already; a second merge would add the update twice")
    _refuse_merge(layers)
    for layer in layers:
        layer.merge()


def unmerge(model: nnx.Module) -> None:
    """Undoes `merge`: base weights are bitwise equal to those before it.

    Raises:
        LoraError: if the model is not merged; nothing is changed in that case.
    """
    layers = [layer for _, layer in _wrapped(model) if isinstance(layer, LoRALayer)]
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
    layers = _wrapped(model)
    _refuse_merge([layer for _, layer in layers if isinstance(layer, LoRALayer)])
    for path, layer in layers:
        if isinstance(layer, SavedModule):
            replace(model, path, layer.folded())
            continue
        if not layer.merged:
            layer.merge()
        replace(model, path, layer.base)


def _wrapped(model: nnx.Module) -> list[tuple[Path, LoRALayer | SavedModule]]:
    layers = owners(model)
    if not layers:
        raise LoraError(f"{type(model).__name__} has no LoRA layers; call wrap first")
    return layers


def _refuse_merge(layers: list[LoRALayer]) -> None:
    for layer in layers:
        for adapter in layer.in_use:
            layer.refuse_merge(adapter)


def _refuse_ranks(targets: list[Target]) -> None:
    problems = []
    for layer, spec in ((target.layer, target.spec) for target in targets):
        for index, part in enumerate(spec.slices):
            largest = max(row[index] for row in spec.ranks)
            if largest > min(layer.features_in, part.size):
                where = layer.slice_name(layer.name, part)
                problems.append(
                    f"r={largest} is above the smaller side of {where} "
                    f"[{layer.features_in}, {part.size}]"
                )
        count = groups(layer)
        if any(rank % count for row in spec.ranks for rank in row):
            problems.append(f"the rank of {layer.name} must be divisible by its {count} groups")
        if count > 1 and len(set(spec.ranks)) > 1:
            problems.append(f"the layers of {layer.name} must have one rank, for it has groups")
    if problems:
        raise LoraError("; ".join(problems))


def _saved_paths(model: nnx.Module, config: LoraConfig) -> list[Path]:
    paths: list[Path] = []
    used: set[str] = set()
    for path, module in modules(model):
        hits = [
            target
            for target in config.modules_to_save or ()
            # As in PEFT, matches the end of the name, even in the middle of a component.
            if path and any(name.endswith(target) for name in _names(model, path))
        ]
        used.update(hits)
        inside_other = any(path[: len(other)] == other for other in paths)
        if hits and not inside_other and nnx.state(module, nnx.Param):
            if isinstance(module, LoRALayer):
                raise LoraError(f"modules_to_save: {dotted(path)} has an update of another adapter")
            paths.append(path)
    missing = sorted(set(config.modules_to_save or ()) - used)
    if missing:
        raise LoraError(
            f"modules_to_save {missing} matched no module; this model has "
            f"{listing(find_layers(model))} and {_others(model)}"
        )
    return paths


def _token_paths(model: nnx.Module, config: LoraConfig) -> dict[Path, tuple[int, ...]]:
    tokens = config.trainable_token_indices
    if not tokens:
        return {}
    pairs: Any = tokens
    if isinstance(next(iter(tokens)), int):
        pairs = ((INPUT_EMBEDDING, tokens),)
    found: dict[Path, tuple[int, ...]] = {}
    for name, ids in pairs:
        paths = [
            path
            for path, module in modules(model)
            if _is_embedding(module) and any(matches((name,), n) for n in _names(model, path))
        ]
        if not paths:
            raise LoraError(f"trainable_token_indices: there is no embedding {name!r}")
        for path in paths:
            if isinstance(get(model, path), LoRALayer) or any(stacks(model, path)):
                raise LoraError(f"trainable_token_indices: {dotted(path)} has an update or a stack")
            found[path] = tuple(ids)
    return found


def _is_embedding(module: object) -> bool:
    base = module.base if isinstance(module, (LoRALayer, SavedModule)) else module
    return isinstance(getattr(base, "embedding", None), nnx.Variable)


def _saved_at(model: nnx.Module, path: Path, kind: type[SavedModule]):
    module = get(model, path)
    if not isinstance(module, kind):
        if isinstance(module, SavedModule):
            raise LoraError(f"{dotted(path)} trains whole and by rows; it can only be one of them")
        assert isinstance(module, nnx.Module)
        module = kind(module)
        replace(model, path, module)
    return module


def _names(model: nnx.Module, path: Path) -> tuple[str, ...]:
    return torch_names(path, stacks(model, path))


def _others(model: nnx.Module) -> str:
    layers = {layer.path for layer in find_layers(model)}
    names = [str(path[-1]) for path, _ in modules(model) if path and path not in layers]
    return ", ".join(dict.fromkeys(names))
