"""Adapters in Hugging Face PEFT's format: `adapter_config.json`, `adapter_model.safetensors`."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy
from flax import nnx

from lora_flax.config import DEFAULT, LoraConfig
from lora_flax.errors import LoraError
from lora_flax.files import write_atomically
from lora_flax.index import ModelIndex
from lora_flax.layers.trained_whole import TrainedCopy, TrainedTokens
from lora_flax.peft.extras import plain_slots
from lora_flax.peft.insert import insert_tensors
from lora_flax.peft.pairs import Pair, pair_tensors, pairs
from lora_flax.summary import Report, report_on
from lora_flax.surgery.named_adapters import active_of, names_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_READ = tuple(field.name for field in dataclasses.fields(LoraConfig))
# Fields that describe where an adapter comes from or how it was initialized; none of them changes
# the meaning of the saved tensors.
_NO_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
# Initializations that leave the base unchanged; for a file they are all equivalent.
_KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal", None)
# Initializations that subtract A B from the base; the start can be recomputed from the base.
_FOUND_AGAIN = ("pissa", "olora")


def save_peft(
    model: nnx.Module,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    adapter_name: str | None = None,
    unfused: bool = False,
) -> None:
    """Writes one adapter of a wrapped model, merged or not, in a form PEFT can load.

    Tensors are float32. Each file is written under a temporary name and then renamed, the config
    last: a crash leaves either the old file or the new one, never a partial one. With several
    processes, all of them must call this; the first one writes.

    Args:
        model: a wrapped model. If training holds the trainable arrays separately, put them back
            first with `nnx.update(model, trainable)`.
        directory: created if it does not exist; other files in it are kept.
        base_model_name_or_path: the model that the adapter belongs to, which PEFT loads with it.
        revision: revision of that model.
        task_type: PEFT's task name; None for a model that is not from transformers.
        adapter_name: defaults to the active adapter.
        unfused: write the projections of a fused layer individually (`q_proj`, `k_proj`, `v_proj`
            for `qkv_proj`), for a model or server that keeps them separate.

    Raises:
        LoraError: if the model has no such adapter, or tensors contain NaN or infinity; it names
            them.
    """
    index = ModelIndex(model)
    name = _name_to_save(index, adapter_name)
    tensors: dict[str, np.ndarray] = {}
    found: list[Pair] = []
    for layer in index.layers:
        adapter = layer.adapter(name)
        for pair in pairs(layer, adapter, unfused) if adapter is not None else ():
            found.append(pair)
            tensors |= pair_tensors(layer, pair)
    config = _config_of(index, name)
    for slot in plain_slots(index, config.bias, name):
        tensors |= slot.tensors(index)
    _refuse_nonfinite(tensors, "the adapter is not saved")
    fields = {
        "peft_type": "LORA",
        "task_type": task_type,
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "inference_mode": True,
        **config.to_json(),
        **_pattern_fields(index, config, found),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    }
    if jax.process_index():
        return
    folder = FilePath(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # "format": transformers and PEFT reject a file that does not name its framework.
    write_atomically(folder / WEIGHTS_FILE, safetensors.numpy.save(tensors, {"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def load_peft(
    model: nnx.Module, directory: str | os.PathLike[str], adapter_name: str = DEFAULT
) -> Report:
    """Loads a PEFT adapter into the model, in place, and activates it.

    Nothing is changed unless the entire adapter fits. Names in `target_modules` that match no layer
    are accepted, as in PEFT, which writes them out unchecked; what matters is that the tensors in
    the file are exactly those of the layers that do match. The projections of a fused layer may be
    stored under their own names.

    Args:
        model: plain or wrapped; an existing adapter of that name is replaced if it is compatible.
        directory: contains `adapter_config.json` and `adapter_model.safetensors` (any float dtype).
        adapter_name: name of the adapter in the model.

    Returns:
        What is wrapped, in the same form as `wrap` returns.

    Raises:
        LoraError: for a folder without these files, unsupported options that change what the
            adapter means (all of them are named), a model that is merged or wrapped differently,
            and for missing, unexpected, misshapen or non-finite tensors, all in one message.
    """
    folder = FilePath(directory)
    config = _read_config(folder / CONFIG_FILE)
    index = ModelIndex(model)
    if any(layer.merged for layer in index.wrappers.values()):
        raise LoraError("the model is merged; unmerge it before loading an adapter")
    tensors = _read_weights(folder / WEIGHTS_FILE)
    _refuse_nonfinite(tensors, f"{folder / WEIGHTS_FILE} is not loaded")
    insert_tensors(index, config, tensors, adapter_name, str(folder / WEIGHTS_FILE))
    return report_on(index)


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
        names = index.names(path)
        if name not in module.adapters:
            continue
        if isinstance(module, TrainedCopy):
            whole += index.shortest_endings(names)
        if isinstance(module, TrainedTokens):
            tokens |= {n: module.adapters[name].ids for n in index.shortest_endings(names)}
    return whole, tokens


def _pattern_fields(index: ModelIndex, config: LoraConfig, found: list[Pair]) -> dict[str, Any]:
    """`target_modules`, the most common `r` and `lora_alpha`, and patterns for the rest."""
    if not found:
        # PEFT requires a list, and accepts an empty one if there are modules_to_save.
        return {"target_modules": []}
    names = [pair.name for pair in found]

    def short(some: Iterable[str]) -> list[str]:
        others = set(names) - set(some)
        return index.shortest_endings(set(some), others)

    common: dict[str, Any] = {}
    for field, values in (
        ("r", {pair.name: pair.rank for pair in found}),
        ("lora_alpha", {pair.name: pair.alpha for pair in found}),
    ):
        counts = collections.Counter(values.values())
        usual = getattr(config, field)
        usual = usual if usual in counts else counts.most_common(1)[0][0]
        common[field] = _integer(usual)
        pattern: dict[str, float] = {}
        for value in sorted(set(values.values()) - {usual}):
            of_value = [name for name in names if values[name] == value]
            pattern |= dict.fromkeys(short(of_value), _integer(value))
        common["rank_pattern" if field == "r" else "alpha_pattern"] = pattern
    return {"target_modules": short(names), **common}


def _integer(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _read_config(file: FilePath) -> LoraConfig:
    if not file.is_file():
        raise LoraError(f"{file.parent} is not a PEFT adapter: it has no {file.name}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        found = fields.get("peft_type") if isinstance(fields, dict) else fields
        raise LoraError(
            f"{file} does not describe a LoRA adapter: peft_type is {found!r}, not 'LORA'"
        )
    unsupported = [
        f"{name}={value!r}"
        for name, value in sorted(fields.items())
        if name not in _NO_EFFECT and name not in _READ and value
    ]
    start = fields.get("init_lora_weights", True)
    if start not in (*_KEEP_BASE, *_FOUND_AGAIN):
        unsupported.append(f"init_lora_weights={start!r}")
    if unsupported:
        raise LoraError(f"{file} uses unsupported options: {', '.join(unsupported)}")
    known = {name: fields[name] for name in _READ if fields.get(name) is not None}
    if start not in _FOUND_AGAIN:
        known["init_lora_weights"] = True
    if known.get("target_modules") == []:
        del known["target_modules"]
    try:
        return LoraConfig(**known)
    except LoraError as error:
        raise LoraError(f"{file}: {error}") from error


def _read_weights(file: FilePath) -> dict[str, np.ndarray]:
    if not file.is_file():
        if file.with_suffix(".bin").is_file():
            raise LoraError(
                f"{file.parent} stores its weights as a pickle ({file.stem}.bin), which is not "
                "supported; load it once with PEFT and call save_pretrained to write safetensors"
            )
        raise LoraError(f"{file.parent} has no {file.name}")
    try:
        # The numpy reader does not support bfloat16.
        tensors = safetensors.flax.load_file(str(file))
    except safetensors.SafetensorError as error:
        raise LoraError(f"{file} is damaged: {error}") from error
    return {key: np.asarray(value).astype(np.float32) for key, value in tensors.items()}


def _refuse_nonfinite(tensors: dict[str, np.ndarray], what: str) -> None:
    bad = [key for key, tensor in sorted(tensors.items()) if not np.isfinite(tensor).all()]
    if bad:
        raise LoraError(f"{what}: NaN or infinity in {', '.join(bad)}")
