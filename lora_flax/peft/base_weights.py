"""The base weights in a PEFT file: its embedding and head in full.

PEFT saves them if their number of rows was changed (`resize_token_embeddings`), if they have an
update, or if asked to by `save_embedding_layers=True`, and puts them into the base when it loads
the file. Weights that equal the base's are dropped here; others go into a `ReplacedBase`, so that
they are written again with the adapter.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.host import on_host
from lora_flax.index import ModelIndex
from lora_flax.layers.kinds import plain
from lora_flax.layers.trained_whole import ReplacedBase
from lora_flax.peft.extras import BASE_NAMES
from lora_flax.surgery.saved_modules import Undo, add_saved, fit_tied_heads
from lora_flax.targets.naming import PREFIX, Path

Tensors = dict[str, np.ndarray]


def take_base_weights(
    index: ModelIndex, config: LoraConfig, tensors: Tensors, name: str, undo: list[Undo]
) -> Tensors:
    """Moves the base weights of a file into the model.

    Args:
        index: of the model.
        config: the file's config.
        tensors: the file's tensors.
        name: name of the adapter.
        undo: gets the functions that undo it.

    Returns:
        The other tensors.

    Raises:
        LoraError: if a weight cannot be put into this model.
    """
    tensors = dict(tensors)
    for path, module in index.modules.items():
        layer = plain(module)
        kind = "kernel" if hasattr(layer, "kernel") else "embedding"
        if not hasattr(layer, kind) or index.stack(path) or hasattr(layer, "kernel_size"):
            continue
        (own,) = index.names(path)
        names = [own, head] if (head := getattr(layer, "tied_head", None)) else [own]
        found = [weight for n in names for weight in _take(config, tensors, n)]
        rows = [f"{PREFIX}{n}.token_adapter.trainable_tokens_delta" for n in names]
        if len(names) > 1 and all(key in tensors for key in rows):
            # PEFT writes the rows of an embedding a second time under its tied head's name.
            if np.array_equal(tensors[rows[0]], tensors[rows[1]]) and not _trains_head(config, own):
                del tensors[rows[1]]
        if not found:
            _refuse_other(index, path, name)
            continue
        if any(not np.array_equal(weight, found[0]) for weight in found[1:]):
            raise LoraError(
                f"the file has different base weights for {' and '.join(names)}, which are one "
                "weight in this model"
            )
        if not _is_base(getattr(layer, kind)[...], found[0], kind, own):
            replaced, step = add_saved(index, path, ReplacedBase, name)
            # Undone in reverse: the head reads the rows that are there at the end.
            undo.append(functools.partial(fit_tied_heads, index))
            undo.append(functools.partial(setattr, replaced, "active", replaced.active))
            undo.append(step)
            replaced.put(name, found[0])
            index.replace(path, index.get(path))
            fit_tied_heads(index)
    return tensors


def _take(config: LoraConfig, tensors: Tensors, name: str) -> list[np.ndarray]:
    """Removes and returns the base weights of the module with that name."""
    trained = any(name.endswith(target) for target in config.modules_to_save or ())
    keys = [f"{PREFIX}{name}.{base}weight" for base in BASE_NAMES if base or not trained]
    # Beside a module that trains in full, PEFT writes its copy a second time.
    tensors.pop(f"{PREFIX}{name}.modules_to_save.weight", None)
    return [tensors.pop(key) for key in keys if key in tensors]


def _trains_head(config: LoraConfig, embedding: str) -> bool:
    """Whether the config has tokens of the head that are not those of the embedding."""
    tokens: Any = config.trainable_token_indices or ()
    by_name = dict(entry for entry in tokens if not isinstance(entry, int))
    own = [ids for name, ids in by_name.items() if embedding.endswith(name)]
    return any(ids not in own for ids in by_name.values())


def _is_base(value: Any, weight: np.ndarray, kind: str, name: str) -> bool:
    if not isinstance(value, jax.Array):
        raise LoraError(
            f"the file has a base weight for {name}, which is quantized in this model; load the "
            "model without quantizing it"
        )
    here = on_host(value).astype(np.float32)
    here = here.T if kind == "kernel" else here
    if weight.ndim != 2 or weight.shape[1] != here.shape[1]:
        raise LoraError(
            f"the file's base weight of {name} is {list(weight.shape)}; this model's is "
            f"{list(here.shape)}"
        )
    return weight.shape == here.shape and bool(np.allclose(weight, here, rtol=1e-2))


def _refuse_other(index: ModelIndex, path: Path, name: str) -> None:
    """Raises LoraError if the adapter in the model has replaced this base weight."""
    for other, module in index.saved_modules.items():
        replaced = isinstance(module, ReplacedBase) and name in module.adapters
        if replaced and index.place(other) == path:
            raise LoraError(
                f"adapter {name!r} in the model has its own base weight for "
                f"{index.names(path)[0]} and the file has none; load it into a fresh model"
            )
