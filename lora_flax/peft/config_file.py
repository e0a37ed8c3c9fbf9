"""What `adapter_config.json` says, as far as it changes what an adapter means."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path as FilePath
from typing import Any

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError, at_most_ten

# The version whose fields are known here.
PEFT_VERSION = "0.21"
_READ = tuple(field.name for field in dataclasses.fields(LoraConfig))
# Fields that describe where an adapter comes from or how it was initialized; none of them changes
# the meaning of the saved tensors.
_NO_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
# PEFT 0.21's other fields, which change the result, and their defaults.
_UNSUPPORTED = {
    "use_qalora": False,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_bdlora": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
    "megatron_config": None,
}
# Numbers; with null, PEFT does not load the adapter either.
_NEVER_NULL = ("r", "lora_alpha", "lora_dropout")
# Initializations that leave the base unchanged; for a file they are all equivalent.
_KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica", None)
# Initializations that subtract A B from the base; the start can be recomputed from the base.
_FOUND_AGAIN = ("pissa", "olora")
# Of these, not even PEFT finds the base again.
_NOT_FOUND = ("pissa_niter_", "corda", "loftq")
_HINT = (
    "; this init_lora_weights changed the base in a way that the file does not hold: where the "
    "adapter was trained, save it with PEFT's path_initial_model_for_weight_conversion"
)


def read_config(file: FilePath) -> LoraConfig:
    """The config of an adapter.

    A field that PEFT 0.21 does not have is ignored with a warning: whether the adapter means
    something else with it is seen from its tensors, which must be exactly those expected.

    Raises:
        LoraError: if the file is missing or damaged, or uses unsupported options (all are named).
    """
    if not file.is_file():
        raise LoraError(f"{file.parent} is not a PEFT adapter: it has no {file.name}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        found = fields.get("peft_type") if isinstance(fields, dict) else fields
        raise LoraError(
            f"{file} does not describe a LoRA adapter: peft_type is {found!r}, not 'LORA'"
        )
    unsupported = [
        f"{name}={value!r}"
        for name, value in sorted(fields.items())
        if name in _UNSUPPORTED and value is not None and value != _UNSUPPORTED[name]
    ]
    start = _start(fields.get("init_lora_weights", True), file)
    if start not in (*_KEEP_BASE, *_FOUND_AGAIN):
        unsupported.append(f"init_lora_weights={start!r}")
    if unsupported:
        hint = _HINT if isinstance(start, str) and start.startswith(_NOT_FOUND) else ""
        raise LoraError(
            f"{file} uses unsupported options: {', '.join(at_most_ten(unsupported))}{hint}"
        )
    unknown = fields.keys() - _UNSUPPORTED.keys() - _NO_EFFECT - set(_READ)
    if unknown:
        named = ", ".join(at_most_ten(f"{name}={fields[name]!r}" for name in sorted(unknown)))
        warnings.warn(
            f"{file} has fields that PEFT {PEFT_VERSION} does not have, which are ignored: {named}",
            stacklevel=2,
        )
    known = {name: fields[name] for name in _READ if fields.get(name) is not None}
    known |= {name: None for name in _NEVER_NULL if name in fields.keys() - known.keys()}
    known["init_lora_weights"] = start if start in _FOUND_AGAIN else True
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        if known.get(name) == []:
            del known[name]
    try:
        return LoraConfig(**known)
    except LoraError as error:
        raise LoraError(f"{file}: {error}") from error


def _start(value: Any, file: FilePath) -> Any:
    """`init_lora_weights` as PEFT reads it when it loads a file."""
    if not isinstance(value, str):
        return value
    start = value.lower()  # PEFT takes `OLoRA` and `Gaussian` too
    if start == "lora_ga":
        warnings.warn(
            f"{file}: init_lora_weights='lora_ga' changed the base before training; the adapter "
            "is right only on the base that was saved after that",
            stacklevel=3,
        )
        return True
    return start
