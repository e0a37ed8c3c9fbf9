"""Writes adapters in Hugging Face PEFT's format."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.files import remove_durably, write_atomically
from lora_flax.index import Layer, ModelIndex
from lora_flax.layers.trained_whole import ReplacedBase, TokenRows
from lora_flax.peft.extras import plain_slots, replaced_slots, trained_names
from lora_flax.peft.padding import pad, shared_rank
from lora_flax.peft.pairs import Pair, pair_tensors, pairs
from lora_flax.surgery.named_adapters import active_of, names_of
from lora_flax.targets.endings import shortest_endings, shortest_text_endings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in PEFT's form, in memory.

    Attributes:
        config: the fields of `adapter_config.json`.
        tensors: float32, by their keys in `adapter_model.safetensors`.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the two files, on the first process.

        Each file is written under a temporary name and then renamed, the config last: a crash
        leaves either the old file or the new one, never a partial one. The config of another
        adapter is removed first, so that it never describes the new weights.

        Args:
            directory: created if it does not exist; other files in it are kept.
        """
        if jax.process_index():
            return
        folder = FilePath(directory)
        folder.mkdir(parents=True, exist_ok=True)
        # "format": transformers and PEFT reject a file that does not name its framework.
        data = safetensors.numpy.save(self.tensors, {"format": "pt"})
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        config = folder / CONFIG_FILE
        if config.is_file() and config.read_bytes() != text.encode():
            remove_durably(config)
        write_atomically(folder / WEIGHTS_FILE, data)
        write_atomically(config, text)


def save_peft(
    model: nnx.Module,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    adapter_name: str | None = None,
    unfused: bool = False,
    keep_rslora: bool = False,
) -> None:
    """Writes one adapter of a wrapped model, merged or not, in a form PEFT can load.

    `to_peft` says what is written, and `PeftAdapter.save` how. With several processes, all of them
    must call this; the first one writes.

    Args:
        model: a wrapped model. If training holds the trainable arrays separately, put them back
            first with `nnx.update(model, trainable)`.
        directory: created if it does not exist; other files in it are kept.
        base_model_name_or_path: the model that the adapter belongs to, which PEFT loads with it.
        revision: revision of that model.
        task_type: PEFT's task name; None for a model that is not from transformers.
        adapter_name: defaults to the active adapter.
        unfused: as for `to_peft`.
        keep_rslora: as for `to_peft`.

    Raises:
        LoraError: as for `to_peft`.
    """
    adapter = to_peft(
        model,
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        task_type=task_type,
        adapter_name=adapter_name,
        unfused=unfused,
        keep_rslora=keep_rslora,
    )
    adapter.save(directory)


def to_peft(
    model: nnx.Module,
    *,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    adapter_name: str | None = None,
    unfused: bool = False,
    keep_rslora: bool = False,
) -> PeftAdapter:
    """One adapter of a wrapped model, merged or not, in PEFT's form.

    If all pairs have the same scale, they are written with one rank (see
    `lora_flax/peft/padding.py`), so that the file means the same to every program that reads it.
    Otherwise `rank_pattern` and `alpha_pattern` hold what differs.

    Args:
        model: a wrapped model.
        base_model_name_or_path: the model that the adapter belongs to.
        revision: revision of that model.
        task_type: PEFT's task name.
        adapter_name: defaults to the active adapter.
        unfused: write the projections of a fused layer individually (`q_proj`, `k_proj`, `v_proj`
            for `qkv_proj`), for a model or server that keeps them separate.
        keep_rslora: write an adapter trained with `use_rslora` as one. By default it becomes plain
            LoRA with the same scale, which programs that do not know rsLoRA read correctly too.

    Raises:
        LoraError: if the model has no such adapter, or tensors contain NaN or infinity; it names
            them.
    """
    index = ModelIndex(model)
    name = _name_to_save(index, adapter_name)
    found: list[tuple[Layer, Pair]] = []
    for layer in index.layers:
        adapter = layer.adapter(name)
        if adapter is not None:
            found += [(layer, pair) for pair in pairs(layer, adapter, unfused)]
    config = _config_of(index, name)
    rank = shared_rank(found, config.use_rslora)
    tensors: dict[str, np.ndarray] = {}
    for layer, pair in found:
        own = pair_tensors(layer, pair)
        tensors |= own if rank is None else pad(layer, pair.name, own, rank)
    for slot in [*plain_slots(index, config.bias, name), *replaced_slots(index, name)]:
        tensors |= slot.tensors(index)
    refuse_nonfinite(tensors, "the adapter is not saved")
    named = [pair for _, pair in found]
    fields = {
        "peft_type": "LORA",
        "task_type": task_type,
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "inference_mode": True,
        **config.to_json(),
        "target_modules": _target_modules(index, named),
        **(
            _pattern_fields(index, config, named)
            if rank is None
            else _one_rank_fields(config, named, rank, keep_rslora)
        ),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    }
    return PeftAdapter(fields, tensors)


def _name_to_save(index: ModelIndex, name: str | None) -> str:
    names = names_of(index)
    if not names:
        raise LoraError(f"{type(index.model).__name__} has no LoRA layers to save; call wrap first")
    if name is not None and name not in names:
        raise LoraError(f"no adapter {name!r}; the model has {names}")
    active = [n for n in active_of(index) if n in names]
    return name or (active or names)[0]


def _config_of(index: ModelIndex, name: str) -> LoraConfig:
    """An adapter's config, as far as the modules record it."""
    config = None
    for layer in index.wrappers.values():
        if name in layer.adapters:
            config = layer.adapters[name].spec.config
            break
    if config is None:
        config = LoraConfig()
    saved, tokens = _saved_names(index, name)
    return dataclasses.replace(
        config,
        modules_to_save=saved or None,
        trainable_token_indices=tokens or None,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
    )


def _saved_names(index: ModelIndex, name: str) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    whole: list[str] = []
    tokens: dict[str, tuple[int, ...]] = {}
    for path, module in index.saved_modules.items():
        if name not in module.adapters or isinstance(module, ReplacedBase):
            continue
        trained = module.adapters[name]
        names = shortest_text_endings(index, trained_names(index, path, name))
        if isinstance(trained, TokenRows):
            tokens |= dict.fromkeys(names, trained.ids)
        else:
            whole += names
    return sorted(whole), tokens


def _target_modules(index: ModelIndex, found: list[Pair]) -> list[str]:
    """Suffixes that name exactly the layers with a pair."""
    # PEFT requires a list, and accepts an empty one if there are modules_to_save.
    return _endings(index, {pair.name for pair in found})


def _endings(index: ModelIndex, wanted: set[str], others: Iterable[str] = ()) -> list[str]:
    """The shortest suffixes for the named layers, which match no other layer and no slice of one.

    A file of individual projections is for a model in which each slice is a layer.
    """
    slices = {
        layer.slice_name(name, part)
        for layer in index.layers
        for name in layer.names
        for part in layer.slices
    }
    return shortest_endings(index, wanted, (slices | set(others)) - wanted)


def _one_rank_fields(
    config: LoraConfig, found: list[Pair], rank: int, keep_rslora: bool
) -> dict[str, Any]:
    """`r` and the `lora_alpha` that gives it the scale that all pairs have."""
    largest = max(found, key=lambda pair: pair.rank)
    use_rslora = config.use_rslora and keep_rslora
    # Computed from the pair of that rank, if there is one, so that its alpha is exact.
    ratio = rank / largest.rank
    alpha = largest.alpha * (math.sqrt(ratio) if config.use_rslora else ratio)
    if config.use_rslora and not keep_rslora:
        alpha = float(f"{alpha * math.sqrt(rank):.12g}")  # 6, not 6.000000000000001
    return {
        "r": rank,
        "lora_alpha": _integer(alpha),
        "use_rslora": use_rslora,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _pattern_fields(index: ModelIndex, config: LoraConfig, found: list[Pair]) -> dict[str, Any]:
    """The most common `r` and `lora_alpha`, and patterns for the rest."""
    if not found:
        return {}
    names = [pair.name for pair in found]
    fields: dict[str, Any] = {}
    for field, values in (
        ("r", {pair.name: pair.rank for pair in found}),
        ("lora_alpha", {pair.name: pair.alpha for pair in found}),
    ):
        counts = collections.Counter(values.values())
        usual = getattr(config, field)
        usual = usual if usual in counts else counts.most_common(1)[0][0]
        fields[field] = _integer(usual)
        pattern: dict[str, float] = {}
        for value in sorted(set(values.values()) - {usual}):
            of_value = {name for name in names if values[name] == value}
            others = set(names) - of_value
            pattern |= dict.fromkeys(_endings(index, of_value, others), _integer(value))
        fields["rank_pattern" if field == "r" else "alpha_pattern"] = pattern
    return fields


def _integer(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def refuse_nonfinite(tensors: dict[str, np.ndarray], what: str) -> None:
    """Raises LoraError, naming the tensors with NaN or infinity."""
    bad = [key for key, tensor in sorted(tensors.items()) if not np.isfinite(tensor).all()]
    if bad:
        raise LoraError(f"{what}: NaN or infinity in {', '.join(bad)}")
