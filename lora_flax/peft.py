"""Adapters as Hugging Face PEFT keeps them: `adapter_config.json`, `adapter_model.safetensors`.

PEFT holds A as `[r, in]` and B as `[out, r]`, one pair for each layer under its PyTorch name:

    base_model.model.layers.3.attn.qkv_proj.lora_A.weight

so a stack is cut along its axis, transposed, and its index goes into the name. Both directions
read one table of slots, made from the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy
from flax import nnx

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.inject import wrap
from lora_flax.layers import LoRADense
from lora_flax.table import Report, report
from lora_flax.targets import (
    Layer,
    Path,
    exact_targets,
    find_layers,
    get,
    select_layers,
    stacks,
    torch_names,
    wrappers,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

_READ = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias")
# Fields that say where an adapter comes from, how PyTorch lays out a weight, or how A and B were
# first drawn; none of them changes what the saved tensors mean.
_NO_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "fan_in_fan_out", "init_lora_weights", "megatron_core",
    "qalora_group_size", "layers_pattern", "ensure_weight_tying", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
# The other initialisations (pissa, olora, corda, loftq ...) take a part out of the base weights:
# their adapters belong to a base that is not the checkpoint's.
_KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Slot:
    """One variable of the wrapped model and its tensors in the file, one for each stack member."""

    path: Path
    keys: tuple[str, ...]
    shape: tuple[int, ...]  # of one tensor, as in PyTorch
    transposed: bool


def save_peft(
    model: nnx.Module,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Writes the adapter of a wrapped model, merged or not, as one that PEFT loads.

    Tensors are float32. Each file is written under another name and then renamed, the config last:
    a crash leaves the old file or the new one, never half of one.

    Args:
        model: a wrapped model. Arrays that training holds apart go in first, with
            `nnx.update(model, trainable)`.
        directory: made if it is not there; other files in it stay.
        base_model_name_or_path: the model that the adapter belongs to, which PEFT loads with it.
        revision: of that model.
        task_type: PEFT's name of the task, None for a model that is not of transformers.

    Raises:
        LoraError: if the model has no LoRA layers, or tensors hold NaN or infinity; it names them.
    """
    layers = [layer for layer in find_layers(model) if isinstance(layer.module, LoRADense)]
    if not layers:
        raise LoraError(f"{type(model).__name__} has no LoRA layers to save; call wrap first")
    config = _config_of(layers[0])
    tensors: dict[str, np.ndarray] = {}
    for slot in _slots(model, layers, config):
        value = np.asarray(_variable(model, slot.path).get_value()).astype(np.float32)
        shape = slot.shape[::-1] if slot.transposed else slot.shape
        for key, tensor in zip(slot.keys, value.reshape(-1, *shape), strict=True):
            # safetensors writes the buffer, whatever the strides say.
            tensors[key] = np.ascontiguousarray(tensor.T if slot.transposed else tensor)
    _refuse_nonfinite(tensors, "the adapter is not saved")

    alpha = config.lora_alpha
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": exact_targets(model, layers),
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    folder = FilePath(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # "format": transformers and PEFT refuse a file that does not say which library it is for.
    _write(folder / WEIGHTS_FILE, safetensors.numpy.save(tensors, {"format": "pt"}))
    _write(folder / CONFIG_FILE, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def load_peft(model: nnx.Module, directory: str | os.PathLike[str]) -> Report:
    """Puts a PEFT adapter into the model, in place; wraps the model if it is not wrapped.

    Nothing is changed unless the whole adapter fits. Names in `target_modules` that match no layer
    pass, as in PEFT, which writes them out unchecked; what counts is that the tensors in the file
    are exactly those of the layers that do match.

    Args:
        model: the base model, plain or wrapped with an equal config.
        directory: with `adapter_config.json` and `adapter_model.safetensors` (any float dtype).

    Returns:
        What is wrapped, as `wrap` returns it.

    Raises:
        LoraError: for a folder without these files, an option that changes what the adapter means
            and is not supported (all of them named), a model that is merged or wrapped otherwise,
            and for missing, left-over, misshapen or non-finite tensors, all in one message.
    """
    folder = FilePath(directory)
    config = _read_config(folder / CONFIG_FILE)
    layers = select_layers(model, config.target_modules, ignore_unmatched=True)
    wrapped = wrappers(model)
    if wrapped:
        _check_wrapped(model, layers, config)
    slots = _slots(model, layers, config)
    tensors = _read_weights(folder / WEIGHTS_FILE)
    _check_tensors(tensors, slots, folder)

    if not wrapped:
        targets = exact_targets(model, layers)
        wrap(model, LoraConfig(**{**_fields(config), "target_modules": targets}))
    for slot in slots:
        variable = _variable(model, slot.path)
        old = variable.get_value()
        parts = [tensors[key].T if slot.transposed else tensors[key] for key in slot.keys]
        value = np.stack(parts).reshape(old.shape).astype(old.dtype)
        # Arrays that were placed stay where they are; others go where jit wants them.
        placed = getattr(old, "committed", False)
        variable.set_value(jax.device_put(value, old.sharding) if placed else jnp.asarray(value))
    return report(model)


def _config_of(layer: Layer) -> LoraConfig:
    assert isinstance(layer.module, LoRADense)
    return layer.module.config


def _fields(config: LoraConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _READ}


def _variable(model: nnx.Module, path: Path) -> nnx.Variable[Any]:
    variable = get(model, path)
    assert isinstance(variable, nnx.Variable)
    return variable


def _slots(model: nnx.Module, layers: Collection[Layer], config: LoraConfig) -> list[_Slot]:
    """The table, for a model that is wrapped or is about to be."""
    slots = []
    for layer in layers:
        for part, shape in (
            ("lora_A", (config.r, layer.features_in)),
            ("lora_B", (layer.features_out, config.r)),
        ):
            keys = tuple(f"{_PREFIX}{name}.{part}.weight" for name in layer.names)
            slots.append(_Slot((*layer.path, part), keys, shape, transposed=True))
    if config.bias == "none":
        return slots
    owners = {layer.path for layer in layers}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] != "bias":
            continue
        inside = path[-2:-1] == ("base",) and path[:-2] in owners
        owner = path[:-2] if inside else path[:-1]
        if owner not in owners and config.bias == "lora_only":
            continue
        sizes = stacks(model, owner)
        shape = tuple(variable.get_value().shape)[sum(size is not None for size in sizes) :]
        ending = "base_layer.bias" if owner in owners else "bias"
        keys = tuple(f"{_PREFIX}{name}.{ending}" for name in torch_names(owner, sizes))
        target = (*owner, "base", "bias") if owner in owners else path
        slots.append(_Slot(target, keys, shape, transposed=False))
    return slots


def _read_config(file: FilePath) -> LoraConfig:
    if not file.is_file():
        raise LoraError(f"{file.parent} is not a PEFT adapter: it has no {file.name}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        found = fields.get("peft_type") if isinstance(fields, dict) else fields
        raise LoraError(f"{file} is not of a LoRA adapter: peft_type is {found!r}, not 'LORA'")
    unsupported = [
        f"{name}={value!r}"
        for name, value in sorted(fields.items())
        if name not in _NO_EFFECT and name not in _READ and value
    ]
    start = fields.get("init_lora_weights", True)
    if start not in _KEEP_BASE:
        unsupported.append(f"init_lora_weights={start!r}")
    if unsupported:
        raise LoraError(f"{file} uses what is not supported here: {', '.join(unsupported)}")
    try:
        return LoraConfig(**{name: fields[name] for name in _READ if name in fields})
    except LoraError as error:
        raise LoraError(f"{file}: {error}") from error


def _read_weights(file: FilePath) -> dict[str, np.ndarray]:
    if not file.is_file():
        if file.with_suffix(".bin").is_file():
            raise LoraError(
                f"{file.parent} holds its weights as a pickle ({file.stem}.bin), which is not read;"
                " load it once with PEFT and call save_pretrained, which writes safetensors"
            )
        raise LoraError(f"{file.parent} has no {file.name}")
    try:
        # The numpy reader does not know bfloat16.
        tensors = safetensors.flax.load_file(str(file))
    except safetensors.SafetensorError as error:
        raise LoraError(f"{file} is damaged: {error}") from error
    return {key: np.asarray(value).astype(np.float32) for key, value in tensors.items()}


def _check_wrapped(model: nnx.Module, layers: list[Layer], config: LoraConfig) -> None:
    """The model's own wrapping against that of the adapter."""
    wrapped = [layer for layer in find_layers(model) if isinstance(layer.module, LoRADense)]
    if any(layer.merged for _, layer in wrappers(model)):
        raise LoraError("the model is merged; unmerge it before loading an adapter")
    here = _config_of(wrapped[0])
    problems = [
        f"{name} is {getattr(here, name)!r} in the model, {getattr(config, name)!r} in the adapter"
        for name in ("r", "lora_alpha", "use_rslora", "bias")
        if getattr(here, name) != getattr(config, name)
    ]
    ours, theirs = {layer.name for layer in wrapped}, {layer.name for layer in layers}
    if ours - theirs:
        problems.append(f"the adapter has nothing for {', '.join(sorted(ours - theirs))}")
    if theirs - ours:
        problems.append(f"the model has not wrapped {', '.join(sorted(theirs - ours))}")
    if problems:
        raise LoraError(f"the adapter does not fit the wrapped model: {'; '.join(problems)}")


def _check_tensors(tensors: dict[str, np.ndarray], slots: list[_Slot], folder: FilePath) -> None:
    expected = {key: slot.shape for slot in slots for key in slot.keys}
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if left_over := sorted(tensors.keys() - expected.keys()):
        problems.append(f"left over: {', '.join(left_over)}")
    misshapen = [
        f"{key} is {list(tensors[key].shape)}, not {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in tensors and tensors[key].shape != shape
    ]
    if misshapen:
        problems.append(f"wrong shape: {', '.join(misshapen)}")
    if problems:
        raise LoraError(f"{folder / WEIGHTS_FILE} does not fit the model; {'; '.join(problems)}")
    _refuse_nonfinite(tensors, f"{folder / WEIGHTS_FILE} is not loaded")


def _refuse_nonfinite(tensors: dict[str, np.ndarray], what: str) -> None:
    bad = [key for key, tensor in sorted(tensors.items()) if not np.isfinite(tensor).all()]
    if bad:
        raise LoraError(f"{what}: NaN or infinity in {', '.join(bad)}")


def _write(file: FilePath, data: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
