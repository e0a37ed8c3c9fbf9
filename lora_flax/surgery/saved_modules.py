"""Adds what trains in full to a model: `modules_to_save` and `trainable_token_indices`.

At one place of the model, wrappers nest in this order, and all but the last are optional:

    LoRALayer > TrainedHead > TrainedCopy or TrainedTokens > ReplacedBase > the module itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flax import nnx

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError, at_most_ten
from lora_flax.index import ModelIndex
from lora_flax.layers.kinds import plain
from lora_flax.layers.trained_whole import (
    ReplacedBase,
    Replacement,
    SavedModule,
    TrainedCopy,
    TrainedHead,
    TrainedTokens,
)
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.targets.matching import listing, matches, tied_heads
from lora_flax.targets.naming import Path, dotted

Undo = Callable[[], None]
# The module that a plain list in trainable_token_indices refers to, as in PEFT.
INPUT_EMBEDDING = "embed_tokens"
# What each kind is inside of.
_OUTSIDE: dict[type[SavedModule], tuple[type[nnx.Module], ...]] = {
    TrainedHead: (LoRALayer,),
    TrainedCopy: (LoRALayer, TrainedHead),
    TrainedTokens: (LoRALayer, TrainedHead),
    ReplacedBase: (LoRALayer, TrainedHead, TrainedCopy, TrainedTokens),
}


def insert_saved(index: ModelIndex, config: LoraConfig, name: str) -> list[Undo]:
    """Adds the modules and rows that train in full; returns functions that undo it.

    Raises:
        LoraError: if a name matches nothing, or a token is not in the embedding.
    """
    undo: list[Undo] = []
    wanted: list[tuple[Path, type[SavedModule], tuple[Any, ...]]] = [
        *_saved(index, config),
        *_tokens(index, config),
    ]
    _refuse_whole_and_rows(index, wanted)
    try:
        for path, kind, arguments in wanted:
            module, step = add_saved(index, path, kind, name)
            undo.append(step)
            module.add(name, *arguments)
            index.replace(path, index.get(path))
    except Exception:
        for step in reversed(undo):
            step()
        raise
    return undo


def _refuse_whole_and_rows(
    index: ModelIndex, wanted: Iterable[tuple[Path, type[SavedModule], tuple[Any, ...]]]
) -> None:
    """PEFT neither makes nor loads a tied head that trains in full beside rows of either."""
    whole = {path for path, kind, arguments in wanted if kind is TrainedHead and not arguments}
    rows = {path for path, kind, arguments in wanted if arguments and kind is not TrainedCopy}
    for path in whole & rows:
        raise LoraError(
            f"{tied_heads(index)[path]} is in modules_to_save and tied to {dotted(path)}: neither "
            "of them can be in trainable_token_indices then, as in PEFT; keep one of the two"
        )


def add_saved(
    index: ModelIndex, path: Path, kind: type[SavedModule], name: str
) -> tuple[Any, Undo]:
    """The wrapper of that kind at a place, new if it has none, and a function that undoes it.

    Raises:
        LoraError: if the module is trained in full and by tokens.
    """
    place = path
    while isinstance(index.get(place), _OUTSIDE[kind]) and not isinstance(index.get(place), kind):
        place = (*place, "base")
    before = index.get(place)
    if {kind, type(before)} == {TrainedCopy, TrainedTokens}:
        raise LoraError(
            f"{dotted(path)} is in modules_to_save and in trainable_token_indices; keep one of them"
        )
    module = before if isinstance(before, kind) else kind(before)
    old = module.adapters[name] if name in module.adapters else None
    members = getattr(module, "members", {})
    old_members = members[name] if name in members else None
    if module is not before:
        index.replace(place, module)

    def put_back() -> None:
        for now, then in ((module.adapters, old), (members, old_members)):
            if then is not None:
                now[name] = then
            elif name in now:
                del now[name]
        index.replace(place, before)

    return module, put_back


Wanted = Iterable[tuple[Path, type[SavedModule], tuple[Any, ...]]]


def _saved(index: ModelIndex, config: LoraConfig) -> Wanted:
    """Places, kinds and arguments for `modules_to_save`."""
    targets = config.modules_to_save or ()
    used: set[str] = set()

    def hit(name: str) -> bool:
        # As in PEFT, matches the end of the name, even in the middle of a component.
        found = {target for target in targets if name.endswith(target)}
        used.update(found)
        return bool(found)

    modules = {path: module for path, module in index.modules.items() if path}
    hits = {name for path in modules for name in index.names(path) if hit(name)}
    whole = {path for path in modules if hits.issuperset(index.names(path))}
    whole = {path for path in whole if not any(path[:end] in whole for end in range(len(path)))}
    trained: list[tuple[Path, np.ndarray | None]] = []
    for path, module in modules.items():
        if path in whole:
            _refuse_quantized(path, module)
            if nnx.state(module, nnx.Param):
                trained.append((path, None))
        elif not any(path[:end] in whole for end in range(1, len(path) + 1)):
            members = np.array([_is_below(name, hits) for name in index.names(path)])
            own = [v for v in vars(plain(module)).values() if isinstance(v, nnx.Variable)]
            if members.any() and own:
                _refuse_quantized(path, module)
                if any(isinstance(v, nnx.Param) for v in own):
                    trained.append((path, members.reshape(index.stack(path))))
    heads = [path for path, head in tied_heads(index).items() if hit(head)]
    missing = sorted(set(targets) - used)
    if missing:
        raise LoraError(
            f"modules_to_save {missing} matched no module; this model has "
            f"{listing(index.layers)} and {_others(index)}"
        )
    for path, some in trained:
        if some is None and isinstance(index.get(path), LoRALayer):
            raise LoraError(f"modules_to_save: {dotted(path)} is wrapped by another adapter")
        _refuse_statistics(index, path)
    return [
        *((path, TrainedCopy, (some,)) for path, some in trained),
        *((path, TrainedHead, ()) for path in heads),
    ]


def _refuse_quantized(path: Path, module: nnx.Module) -> None:
    """Quantized weights are not parameters, so at most their biases would train."""
    for inner, variable in nnx.to_flat_state(nnx.state(module)):
        weight = inner[-1] in ("kernel", "embedding")
        if weight and not isinstance(variable, nnx.Param | Replacement):
            raise LoraError(
                f"modules_to_save: {dotted((*path, *inner[:-1]))} is quantized, so it cannot train "
                "in full"
            )


def _refuse_statistics(index: ModelIndex, path: Path) -> None:
    """Running statistics would have to be copied, updated and saved along with the parameters."""
    found = nnx.to_flat_state(nnx.state(index.get(path), nnx.BatchStat))
    if found:
        names = ", ".join(at_most_ten(dotted((*path, *inner)) for inner, _ in found))
        raise LoraError(
            f"modules_to_save: {dotted(path)} has running statistics ({names}), which are not "
            "parameters and cannot be trained in full; name only modules without them"
        )


def _tokens(index: ModelIndex, config: LoraConfig) -> Wanted:
    """Places, kinds and arguments for `trainable_token_indices`."""
    tokens: Any = config.trainable_token_indices
    if not tokens:
        return []
    if isinstance(next(iter(tokens)), int):
        tokens = ((INPUT_EMBEDDING, tokens),)
    found: dict[Path, tuple[int, ...]] = {}
    heads: dict[Path, tuple[int, ...]] = {}
    for target, ids in tokens:
        paths = [
            path
            for path, module in index.modules.items()
            if any(matches((target,), name) for name in index.names(path))
            and _has_rows(index, path, module)
        ]
        own = [path for path, head in tied_heads(index).items() if matches((target,), head)]
        if not paths and not own:
            raise LoraError(
                f"trainable_token_indices: the model has no embedding {target!r}, nor an output "
                "head of that name"
            )
        for path in paths:
            if isinstance(index.get(path), LoRALayer) or index.stack(path):
                raise LoraError(
                    f"trainable_token_indices: {dotted(path)} has a LoRA update or is in a stack; "
                    "neither is supported"
                )
            found[path] = tuple(ids)
        heads |= dict.fromkeys(own, tuple(ids))
    # A head tied to an embedding with the same tokens uses the embedding's rows.
    heads = {path: ids for path, ids in heads.items() if found.get(path) != ids}
    return [
        *((path, TrainedTokens, (ids,)) for path, ids in found.items()),
        *((path, TrainedHead, (ids,)) for path, ids in heads.items()),
    ]


def fit_tied_heads(index: ModelIndex) -> None:
    """Gives tied heads that are modules of their own the shape of the weight that they read."""
    heads = tied_heads(index)
    rows = {heads[path]: plain(index.get(path)).embedding.shape[0] for path in heads}
    for path, module in index.modules.items():
        head = plain(module)
        shape, name = getattr(head, "tied_shape", None), index.names(path)[0]
        if shape is not None and name in rows:
            head.tied_shape = (shape[0], rows[name])
            index.replace(path, index.get(path))


def _is_below(name: str, above: set[str]) -> bool:
    return name in above or any(name.startswith(f"{other}.") for other in above)


def _has_rows(index: ModelIndex, path: Path, module: object) -> bool:
    """Whether the module is an embedding, or a dense layer without a bias, as PEFT requires."""
    layer = plain(module)
    if isinstance(getattr(layer, "embedding", None), nnx.Variable):
        return True
    kernel = getattr(layer, "kernel", None)
    if not isinstance(kernel, nnx.Param | Replacement) or getattr(layer, "bias", None) is not None:
        return False
    dimensions: int = kernel[...].ndim
    return dimensions == 2 + len(index.stack(path))


def _others(index: ModelIndex) -> str:
    layers = {layer.path for layer in index.layers}
    names = [str(path[-1]) for path in index.modules if path and path not in layers]
    return ", ".join(dict.fromkeys(names))
