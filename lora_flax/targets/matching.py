"""Which layers a config selects, by PEFT's rules, and with which rank and alpha."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from lora_flax.config import ALL_LINEAR, LoraConfig, Names
from lora_flax.errors import LoraError, at_most_ten
from lora_flax.index import Layer, ModelIndex
from lora_flax.layers.adapter import Slice, Spec
from lora_flax.layers.dense import LoRADense
from lora_flax.layers.trained_whole import SavedModule
from lora_flax.layers.wrappers import LoRALayer
from lora_flax.targets.naming import Path, dotted, endings

# PEFT skips the output embedding of a transformers model; this is its usual name.
OUTPUT_HEAD = "lm_head"
# Names that no layer has, of several lengths.
_NO_NAMES = ("j", "jj", "jjjj", "no_such_layer", "nosuchlayer", "j0")


@dataclass(frozen=True)
class Target:
    """A layer and the spec of its adapter."""

    layer: Layer
    spec: Spec


def select_targets(index: ModelIndex, config: LoraConfig) -> list[Target]:
    """The layers that a config selects (see `LoraConfig`).

    Raises:
        LoraError: listing each target that matched nothing and the available layers; for a layer
            that is selected both as a whole and by slices; for a layer found at several paths, or
            a weight in several layers.
    """
    layers = index.layers
    if not layers:
        problem = f"{type(index.model).__name__} has no layer to adapt{index.odd_kernels()}"
        raise LoraError(problem)
    if config.target_modules is None:
        raise LoraError(f"target_modules is not set; this model has {listing(layers)}")
    used: set[str] = set()
    targets = []
    for layer in layers:
        whole, parts = meant(layer, config, used)
        if any(whole) and parts:
            raise LoraError(
                f"target_modules selects {layer.name} both as a whole and by slices; name either "
                f"the layer or its slices ({', '.join(part.name for part in layer.slices)})"
            )
        chosen = {layer.whole[0]: whole} if any(whole) else parts
        if chosen:
            targets.append(Target(layer, make_spec(layer, config, chosen)))
    _refuse_unmatched(index, config, targets, used)
    refuse_shared(index, [target.layer for target in targets])
    return targets


def meant(
    layer: Layer, config: LoraConfig, used: set[str] | None = None
) -> tuple[list[bool], dict[Slice, list[bool]]]:
    """Which members of a layer a config selects, whole and for each slice.

    Args:
        layer: a layer of the model.
        config: with `target_modules`.
        used: collects the names in `target_modules` that matched.
    """
    used = set() if used is None else used
    whole = _hits(layer, "", config, used)
    if any(whole) and isinstance(config.target_modules, str):
        return whole, {}  # a regular expression such as `.*_proj` selects layers, not their slices
    parts = {part: _hits(layer, part.name, config, used) for part in layer.slices}
    return whole, {part: hits for part, hits in parts.items() if any(hits)}


def named_slices(layer: Layer, config: LoraConfig) -> dict[Slice, list[bool]]:
    """The slices whose names a config matches, for a file of individual projections.

    There, each slice is a layer: a regular expression means all that it matches.
    """
    parts = {part: _hits(layer, part.name, config, set(), any_match=True) for part in layer.slices}
    return {part: hits for part, hits in parts.items() if any(hits)}


def make_spec(layer: Layer, config: LoraConfig, chosen: dict[Slice, list[bool]]) -> Spec:
    """The spec of an adapter on the selected slices; the lists say which members have it."""
    ranks, alphas = [], []
    for index, name in enumerate(layer.names):
        full = [layer.slice_name(name, part) for part in chosen]
        on = [hits[index] for hits in chosen.values()]
        ranks.append(tuple(rank_of(config, n) if o else 0 for n, o in zip(full, on, strict=True)))
        alphas.append(tuple(alpha_of(config, n) for n in full))
    return Spec(config, tuple(chosen), tuple(ranks), tuple(alphas), layer.features_out)


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank of the layer with that name: `rank_pattern`'s, or `r`."""
    rank: int = _pattern(config.rank_pattern, name, config.r)
    return rank


def alpha_of(config: LoraConfig, name: str) -> float:
    """The alpha of the layer with that name: `alpha_pattern`'s, or `lora_alpha`."""
    alpha: float = _pattern(config.alpha_pattern, name, config.lora_alpha)
    return alpha


def listing(layers: Sequence[Layer]) -> str:
    """The last components of the layers' names, with slices in brackets."""
    names = {}
    for layer in layers:
        slices = ", ".join(part.name for part in layer.slices)
        names[str(layer.path[-1])] = f" ({slices})" if slices else ""
    return ", ".join(name + slices for name, slices in names.items())


def tied_heads(index: ModelIndex) -> dict[Path, str]:
    """The names of heads that read an embedding's weight, by the embedding's path."""
    heads = {}
    for path, module in index.modules.items():
        plain = module.plain if isinstance(module, LoRALayer | SavedModule) else module
        if (head := getattr(plain, "tied_head", None)) is not None:
            heads[path] = head
    return heads


def tied_hint(index: ModelIndex, names: Sequence[str]) -> str:
    """What to do about targets that name a tied head, or an empty string."""
    for path, head in tied_heads(index).items():
        if any(matches((name,), head) for name in names):
            return (
                f"; {head} is tied to {dotted(path)} and has no update of its own: train it with "
                "modules_to_save or trainable_token_indices"
            )
    return ""


def refuse_shared(index: ModelIndex, layers: Sequence[Layer]) -> None:
    """Raises LoraError for a layer found at several paths, or a weight found in several modules."""
    paths = {layer.path for layer in layers}
    for same in index.shared:
        if paths.intersection(same):
            raise LoraError(
                f"the same layer is at {' and '.join(dotted(path) for path in same)}; wrapping "
                "one would untie them"
            )
    holders: dict[int, list[Path]] = {}
    for path, module in index.of_type(nnx.Module).items():
        for value in vars(module).values():
            if isinstance(value, nnx.Param):
                holders.setdefault(id(value), []).append(path)
    for held in holders.values():
        places = [index.place(path) for path in held] if len(held) > 1 else []
        if paths.intersection(places):
            where = " and ".join(dotted(path) or "the model itself" for path in places)
            raise LoraError(
                f"{where} hold the same weight, so merging an update into one would change the "
                "other; give each its own, or leave them out"
            )


def matches(names: Names, name: str) -> bool:
    """Whether PEFT would match the name against the names (suffixes, or one regular expression)."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return not set(names).isdisjoint(endings(name))


def _hits(
    layer: Layer, part: str, config: LoraConfig, used: set[str], any_match: bool = False
) -> list[bool]:
    """Whether each member of a layer, or of one of its slices, is selected."""
    match = _matcher(layer, part, config, used, any_match)
    hits = []
    for name in layer.names:
        full = layer.slice_name(name, Slice(part, 0, 0))
        # A stack also matches by its own path, without indices.
        short = layer.slice_name(layer.name, Slice(part, 0, 0))
        hit = match(full) or (full != short and match(short))
        left_out = any(
            matches(config.exclude_modules, n) or _saved_whole(config, n)
            for n in ((full,) if any_match else (name, full))
        )
        chosen = _named_in_full(config, full) or _layer_chosen(config, full)
        hits.append(hit and not left_out and chosen)
    return hits


def _matcher(
    layer: Layer, part: str, config: LoraConfig, used: set[str], any_match: bool
) -> Callable[[str], bool]:
    targets = config.target_modules
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            linear = layer.wrapper is LoRADense and layer.path[-1] != OUTPUT_HEAD and not part
            return lambda name: linear
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise LoraError(
                f"target_modules {targets!r} is not a regular expression: {error}"
            ) from error
        if part and not any_match:
            return lambda name: _means_slice(pattern, name)
        return lambda name: pattern.fullmatch(name) is not None
    wanted = set(targets or ())

    def match(name: str) -> bool:
        found = wanted.intersection(endings(name))
        used.update(found)
        return bool(found)

    return match


def _means_slice(pattern: re.Pattern[str], name: str) -> bool:
    r"""Whether a regular expression matches the name of a slice, and not just any name there.

    PEFT knows no slices: an expression such as `.*self_attn\.(?!qkv)\w+`, which also matches names
    that no layer has, was written for layers.
    """
    if pattern.fullmatch(name) is None:
        return False
    parent, _, last = name.rpartition(".")
    ending = last.rpartition("_")[2]
    made_up = [*_NO_NAMES, *(f"{start}_{ending}" for start in _NO_NAMES)]
    above = f"{parent}." if parent else ""
    return not any(pattern.fullmatch(above + other) for other in made_up)


def _named_in_full(config: LoraConfig, name: str) -> bool:
    """Whether `target_modules` lists the complete name; `layers_to_transform` then has no say."""
    targets = config.target_modules
    return not isinstance(targets, str) and name in (targets or ())


def _saved_whole(config: LoraConfig, name: str) -> bool:
    """Whether a module, or one that contains it, trains in full and so has no update."""
    saved = config.modules_to_save or ()
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved)


def _layer_chosen(config: LoraConfig, name: str) -> bool:
    """`layers_to_transform`: the first number after the pattern must be one of them."""
    chosen = config.layers_to_transform
    if chosen is None or chosen == ():
        return True
    patterns = config.layers_pattern or ()
    if patterns:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = (re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", name) for p in patterns)
    else:
        # PEFT requires two components before the number, since its names start with a prefix.
        found = (m for m in [re.match(r"(?:.*?\.)?[^.]*\.(?P<idx>\d+)\.", name)])
    match = next((m for m in found if m), None)
    indices = chosen if isinstance(chosen, tuple) else (chosen,)
    return match is not None and int(match["idx"]) in indices


def _pattern(pattern: Any, name: str, default: Any) -> Any:
    for key, value in pattern:
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _refuse_unmatched(
    index: ModelIndex, config: LoraConfig, targets: list[Target], used: set[str]
) -> None:
    names, layers = config.target_modules, index.layers
    there = f"this model has {listing(layers)}{index.odd_kernels()}"
    if isinstance(names, str):
        if not targets:
            raise LoraError(
                f"target_modules {names!r} matched no layer; a string must be {ALL_LINEAR!r} or a "
                f"regular expression that matches a full name (such as {layers[0].names[0]!r}), "
                f"a list must hold name suffixes; {there}"
            )
        return
    unmatched = sorted(set(names or ()) - used)
    if unmatched:
        hint = tied_hint(index, unmatched)
        named = ", ".join(at_most_ten(map(repr, unmatched)))
        raise LoraError(f"target_modules [{named}] matched no layer; {there}{hint}")
    if not targets:
        raise LoraError(
            "exclude_modules, modules_to_save and layers_to_transform leave out every layer that "
            f"target_modules {list(names or ())} matched; {there}"
        )
