"""Configs of `axolotl train FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_jax.config.convert.draft import Draft, arguments, hold_out, names, only_lora, quantization
from phi3_jax.errors import UserError

_DEFAULTS: dict[str, Any] = {
    "output_dir": "./model-out",
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": False,
    "logging_steps": 500,
    "save_steps": 500,
}
_FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "auto",
    "sharegpt": "conversations",
    "completion": "text",
    "input_output": "input_output",
}
# What `all-linear` adapts, and names of what is a part of that.
_LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
_COVERED = {*_LINEAR, "all-linear", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
_KERNELS = ("flash_attention", "sdp_attention", "xformers_attention", "flex_attention")


def from_axolotl(draft: Draft, path: Path) -> None:
    """Fill the draft from a file of Axolotl."""
    del path
    kind = draft.take("adapter")
    only_lora(kind in ("lora", "qlora"), f"adapter: {kind}")
    if draft.take("rl"):
        only_lora(False, "rl")
    draft.move("base_model", "model.path")
    draft.move("revision_of_model", "model.revision")
    quantization(draft, True, "nf4")
    _adapter(draft)
    _data(draft)
    for name in _KERNELS:
        if draft.take(name):
            draft.note(f"{name}: true was not taken over: auto picks a kernel of JAX")
    _steps(draft)
    _schedule(draft)
    if isinstance(value := draft.left.get("gradient_checkpointing"), str):
        draft.left["gradient_checkpointing"] = True
        draft.note(f"gradient_checkpointing: {value} is plain gradient checkpointing here")
    names = ("wandb", "tensorboard", "mlflow", "trackio")
    trackers = [name for name in names if draft.take(f"use_{name}")]
    if project := draft.take("wandb_project"):
        trackers += [] if "wandb" in trackers else ["wandb"]
        draft.put("training.project", project)
    draft.put("training.report_to", trackers or None)
    draft.move("wandb_name", "training.run_name")
    if draft.left.get("hub_model_id"):
        draft.left["push_to_hub"] = True
    arguments(draft, _DEFAULTS)


def _adapter(draft: Draft) -> None:
    draft.move("lora_r", "peft.r", 8)
    draft.move("lora_alpha", "peft.lora_alpha", 8)
    draft.put("peft.lora_dropout", draft.take("lora_dropout", 0.0))
    targets = names(draft.take("lora_target_modules"))
    if draft.take("lora_target_linear"):  # Axolotl adapts both
        listed = [targets] if isinstance(targets, str) else targets or []
        others = [name for name in listed if name not in _COVERED]
        targets = [*_LINEAR, *others] if others else "all-linear"
    draft.put("peft.target_modules", targets)
    draft.move("lora_modules_to_save", "peft.modules_to_save")
    draft.move("lora_model_dir", "peft.adapter_name_or_path")
    for name in ("use_dora", "use_rslora", "layers_to_transform", "layers_pattern"):
        draft.move(f"peft_{name}", f"peft.{name}")
    draft.move("peft_init_lora_weights", "peft.init_lora_weights")
    draft.move("peft_trainable_token_indices", "peft.trainable_token_indices")


def _data(draft: Draft) -> None:
    found = [_dataset(draft, source) for source in draft.take("datasets", [])]
    if len(found) == 1:
        for key, value in found[0].items():
            draft.put(f"data.{key}", value)
    elif found:
        draft.put("data.sources", found)
        draft.note(
            "datasets: data.sources mixes them in equal shares until the first is used up; Axolotl "
            "appends them to each other: set weights, and data.stopping_strategy"
        )
    held_out = [_dataset(draft, source) for source in draft.take("test_datasets", [])]
    hold_out(draft, "test_datasets", found, held_out, "test")
    if size := draft.take("val_set_size"):
        draft.put("data.test_size", size if size < 1 else int(size))
    draft.move("dataset_prepared_path", "data.cache_dir")
    draft.move("dataset_processes", "data.dataset_num_proc")
    draft.move("streaming", "data.streaming")
    draft.move("sequence_len", "data.max_length", 512)
    if (strategy := draft.take("excess_length_strategy", "drop")) != "truncate":
        draft.note(f"excess_length_strategy: {strategy}: longer rows are truncated here")
    draft.move("sample_packing", "data.packing")
    draft.move("eval_sample_packing", "data.eval_packing")
    draft.put("data.assistant_only_loss", not draft.take("train_on_inputs", False))
    if (template := draft.take("chat_template")) not in (None, "tokenizer_default"):
        draft.note(
            f"chat_template: {template} was not taken over: the checkpoint's own is used, or "
            "data.chat_template_path"
        )
    if draft.take("special_tokens"):
        draft.note("special_tokens: not taken over: they come from the checkpoint's tokenizer")


def _dataset(draft: Draft, source: dict[str, Any]) -> dict[str, Any]:
    own = dict(source)
    files = own.pop("data_files", None)
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    if (path := own.pop("path", None)) is None:
        raise UserError("a data set has no path; give it one")
    found: dict[str, Any] = {"path": path}
    own.pop("ds_type", None)
    if isinstance(files, str):
        found["path"] = files
    elif files:
        own["data_files"] = files
    for theirs, ours in (("name", "name"), ("split", "split"), ("revision", "revision")):
        if (value := own.pop(theirs, None)) is not None:
            found[ours] = value
    kind = own.pop("type", None)
    name = kind.partition(".")[0].partition(":")[0] if isinstance(kind, str) else None
    if name in _FORMATS:
        found["format"] = _FORMATS[name]
    elif kind is not None:
        draft.note(f"datasets: type {kind!r} was not taken over: the format is detected")
    _drop_defaults(own)
    columns = {}
    if field := own.pop("field", None):
        columns["text"] = field
    if field := own.pop("field_messages", None):
        columns["conversations" if found.get("format") == "conversations" else "messages"] = field
    if columns:
        found["columns"] = columns
    draft.note_rest(f"datasets: {found['path']}", own)
    return found


def _drop_defaults(source: dict[str, Any]) -> None:
    """Forget settings that say what is so anyway."""
    mappings = source.get("message_property_mappings") or {}
    if all(key == value for key, value in mappings.items()):
        source.pop("message_property_mappings", None)
    if all(names == [role] for role, names in (source.get("roles") or {}).items()):
        source.pop("roles", None)
    if source.get("roles_to_train") == ["assistant"]:
        del source["roles_to_train"]
    if source.get("train_on_eos") == "turn":
        del source["train_on_eos"]


def _steps(draft: Draft) -> None:
    draft.move("micro_batch_size", "training.per_device_train_batch_size", 1)
    rows = draft.get("training.per_device_train_batch_size")
    draft.put("training.per_device_eval_batch_size", draft.take("eval_batch_size", rows))
    epochs = draft.take("num_epochs", 1)
    draft.put("training.num_train_epochs", float(epochs))
    for name, key in (("evals_per_epoch", "eval_steps"), ("saves_per_epoch", "save_steps")):
        if times := draft.take(name):
            share = 1 / (times * epochs)
            draft.left[key] = share if share < 1 else None
            if share >= 1:
                draft.left[key.replace("steps", "strategy")] = "epoch"
    if not any(draft.get(f"data.test_{name}") for name in ("size", "path", "split")):
        for name in ("eval_steps", "eval_strategy"):
            if draft.take(name) not in (None, "no"):
                draft.note(f"{name}: not taken over: the file holds nothing out")


def _schedule(draft: Draft) -> None:
    optimizer = draft.take("optimizer", "adamw_torch_fused")
    draft.left["optim"] = {"lion_pytorch": "lion_32bit"}.get(str(optimizer), optimizer)
    kind = draft.take("lr_scheduler", "cosine")
    if low := draft.take("cosine_min_lr_ratio"):
        if kind == "cosine":
            kind = "cosine_with_min_lr"
            draft.left["lr_scheduler_kwargs"] = {"min_lr_rate": low}
        else:
            draft.note(f"cosine_min_lr_ratio: {low} has no effect with lr_scheduler: {kind}")
    draft.left["lr_scheduler_type"] = kind
    if draft.left.get("warmup_steps") is None and draft.left.get("warmup_ratio") is None:
        draft.left["warmup_ratio"] = 0.03
        draft.note("training.warmup_ratio: 0.03, as Axolotl does by default, there at most 100")
