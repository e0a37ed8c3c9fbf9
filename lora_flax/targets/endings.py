"""Names for a file: the shortest suffixes that mean the named modules and no others."""

from __future__ import annotations

from collections.abc import Collection

from lora_flax.index import ModelIndex
from lora_flax.targets.naming import endings


def shortest_endings(
    index: ModelIndex, names: Collection[str], other_names: Collection[str] = ()
) -> list[str]:
    """The shortest dotted suffixes that match the named layers and no other module, sorted."""
    wanted = set(names)
    others = {ending for name in other_names for ending in endings(name)}
    for name in _module_names(index) - wanted:
        others.update(endings(name))
    return sorted({next((e for e in endings(n) if e not in others), n) for n in wanted})


def shortest_text_endings(index: ModelIndex, names: Collection[str]) -> list[str]:
    """The shortest suffixes for `modules_to_save` and `trainable_token_indices`, sorted.

    PEFT matches these by the end of the text, even within a component: `norm` also means
    `input_layernorm`.
    """
    wanted = set(names)
    others = _module_names(index) - wanted

    def shortest(name: str) -> str:
        free = (e for e in endings(name) if not any(other.endswith(e) for other in others))
        return next(free, name)

    return sorted({shortest(name) for name in wanted})


def _module_names(index: ModelIndex) -> set[str]:
    return {name for path in index.modules for name in index.names(path)}
