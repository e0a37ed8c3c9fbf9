"""Configs of `trl sft --config FILE`: ScriptArguments, ModelConfig and SFTConfig in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_jax.config.convert.draft import Draft, arguments, names, only_lora, quantization

# TRL 1.16's `SFTConfig`, with transformers' `TrainingArguments` below it.
_DEFAULTS: dict[str, Any] = {
    "output_dir": "trainer_output",
    "num_train_epochs": 3.0,
    "learning_rate": 2e-5,
    "save_steps": 500,
}


def from_trl(draft: Draft, path: Path) -> None:
    """Fill the draft from a file of TRL."""
    del path
    only_lora(draft.take("use_peft") is True, "use_peft is not true")
    draft.move("model_name_or_path", "model.path")
    if (revision := draft.take("model_revision", "main")) != "main":
        draft.put("model.revision", revision)
    for name in ("dtype", "torch_dtype"):
        draft.move(name, "model.dtype")
    if (kernel := draft.take("attn_implementation")) is not None:
        draft.note(f"attn_implementation: {kernel} was not taken over: auto picks a kernel of JAX")
    double = bool(draft.take("use_bnb_nested_quant"))
    quantization(draft, double, draft.take("bnb_4bit_quant_type", "nf4"))
    _adapter(draft)
    _data(draft)
    arguments(draft, _DEFAULTS)
    if draft.get("training.eval_strategy") in (None, "no"):
        draft.drop("data.test_split")


def _adapter(draft: Draft) -> None:
    draft.move("lora_r", "peft.r")
    draft.move("lora_alpha", "peft.lora_alpha")
    draft.move("lora_dropout", "peft.lora_dropout")
    draft.move("lora_modules_to_save", "peft.modules_to_save")
    draft.move("use_rslora", "peft.use_rslora")
    draft.move("use_dora", "peft.use_dora")
    targets = names(draft.take("lora_target_modules"))
    if isinstance(targets, list) and targets == ["all-linear"]:
        targets = "all-linear"
    if targets is None:
        draft.note("lora_target_modules: PEFT has no default for Phi-3; the config has all-linear")
    draft.put("peft.target_modules", targets)


def _data(draft: Draft) -> None:
    sources = draft.take("datasets")
    draft.move("dataset_name", "data.path")
    draft.move("dataset_config", "data.name")
    draft.move("dataset_train_split", "data.split")
    for name in ("dataset_streaming", "streaming"):
        draft.move(name, "data.streaming")
    draft.move("test_split_size", "data.test_size")
    split = draft.take("dataset_test_split", "test")
    if sources:
        _sources(draft, sources)
    elif draft.get("data.test_size") is None:
        draft.put("data.test_split", split)
    on_answers = draft.take("assistant_only_loss"), draft.take("completion_only_loss")
    draft.put("data.assistant_only_loss", True in on_answers)
    if on_answers == (None, None):
        draft.note(
            "data.assistant_only_loss: false, as TRL does with chats; rows with a prompt and a "
            "completion are learned by the completion there: set it to true for these"
        )
    for name in (
        "max_length", "packing", "packing_strategy", "eval_packing", "truncation_mode",
        "dataset_text_field", "chat_template_path", "dataset_num_proc",
    ):  # fmt: skip
        draft.move(name, f"data.{name}")
    if draft.get("data.packing_strategy") == "bfd-requeue":
        draft.put("data.packing_strategy", "bfd_split")
    if isinstance(multiple := draft.take("pad_to_multiple_of"), int):
        draft.put("data.pad_to_multiple_of", multiple)
    if draft.take("activation_offloading"):
        draft.put("training.remat_policy", "offload")
        draft.left.setdefault("gradient_checkpointing", True)
    if draft.left.get("loss_type") == "chunked_nll":
        draft.left["loss_type"] = "nll"


def _sources(draft: Draft, sources: list[dict[str, Any]]) -> None:
    found = []
    for source in sources:
        own = dict(source)
        files = own.pop("data_files", None)
        made = {"path": files if isinstance(files, str) else own.pop("path")}
        own.pop("path", None)
        made |= {key: own.pop(key) for key in ("name", "split") if own.get(key) is not None}
        found.append(made)
        draft.note_rest("datasets", own)
    if len(found) == 1:
        for key, value in found[0].items():
            draft.put(f"data.{key}", value)
        return
    draft.put("data.sources", found)
    draft.note(
        "datasets: data.sources mixes them in equal shares until the first is used up; TRL appends "
        "them to each other: set weights, and data.stopping_strategy"
    )
