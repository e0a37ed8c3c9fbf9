"""Configs of `llamafactory-cli train FILE`, with `dataset_info.json` for the names of data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_jax.config.convert.draft import Draft, arguments, hold_out, names, only_lora, quantization
from phi3_jax.errors import UserError
from phi3_jax.model.config import read_json_object

_DEFAULTS: dict[str, Any] = {
    "output_dir": "trainer_output",
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "logging_steps": 500,
    "save_steps": 500,
}
_FORMATS = {"alpaca": "alpaca", "sharegpt": "conversations"}
# dataset_info.json's names of columns, and the ones here.
_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    "system": "system",
    "history": "history",
    "tools": "tools",
}


def from_llama_factory(draft: Draft, path: Path) -> None:
    """Fill the draft from a file of LLaMA-Factory."""
    stage, kind = draft.take("stage", "sft"), draft.take("finetuning_type", "lora")
    only_lora(stage == "sft", f"stage: {stage}")
    only_lora(kind == "lora", f"finetuning_type: {kind}")
    draft.take("do_train")
    draft.move("model_name_or_path", "model.path")
    if (revision := draft.take("model_revision", "main")) != "main":
        draft.put("model.revision", revision)
    _quantized(draft)
    _adapter(draft)
    _data(draft, path)
    if draft.take("disable_gradient_checkpointing"):
        draft.put("training.gradient_checkpointing", False)
    draft.move("early_stopping_steps", "training.early_stopping_patience")
    if draft.take("predict_with_generate"):
        draft.put("training.eval_generate", True)
    draft.take("compute_accuracy")  # always measured
    arguments(draft, _DEFAULTS)


def _quantized(draft: Draft) -> None:
    bits, method = draft.take("quantization_bit"), draft.take("quantization_method", "bnb")
    double, kind = draft.take("double_quantization", True), draft.take("quantization_type", "nf4")
    if bits is None:
        return
    if bits not in (4, 8) or method not in ("bnb", "bitsandbytes"):
        draft.note(f"quantization_bit: {bits} by {method} was not taken over: 4 or 8 by bnb is")
        return
    draft.left["load_in_4bit" if bits == 4 else "load_in_8bit"] = True
    quantization(draft, bool(double), kind)


def _adapter(draft: Draft) -> None:
    rank = draft.take("lora_rank", 8)
    draft.put("peft.r", rank)
    draft.put("peft.lora_alpha", draft.take("lora_alpha", 2 * rank))
    draft.put("peft.lora_dropout", draft.take("lora_dropout", 0.0))
    draft.put("peft.target_modules", names(draft.take("lora_target", "all")))
    if isinstance(targets := draft.get("peft.target_modules"), str) and targets != "all-linear":
        draft.put("peft.target_modules", [targets])
    modules = names(draft.take("additional_target"))
    draft.put("peft.modules_to_save", [modules] if isinstance(modules, str) else modules)
    draft.move("use_rslora", "peft.use_rslora")
    draft.move("use_dora", "peft.use_dora")
    steps = draft.take("pissa_iter", 16)
    if draft.take("pissa_init"):
        draft.put("peft.init_lora_weights", "pissa" if steps == -1 else f"pissa_niter_{steps}")
    draft.move("adapter_name_or_path", "peft.adapter_name_or_path")


def _data(draft: Draft, path: Path) -> None:
    folder = Path(draft.take("dataset_dir", "data"))
    weights = draft.take("interleave_probs")
    strategy = draft.take("mix_strategy", "concat")
    found = [_dataset(draft, name, folder, path) for name in _listed(draft.take("dataset"))]
    held_out = [_dataset(draft, name, folder, path) for name in _listed(draft.take("eval_dataset"))]
    if (most := draft.take("max_samples")) is not None:
        for source in [*found, *held_out]:
            source["max_samples"] = min(most, source.get("max_samples", most))
    if len(found) == 1:
        for key, value in found[0].items():
            draft.put(f"data.{key}", value)
    elif found:
        shares = [float(share) for share in _listed(weights)] if weights else [1.0] * len(found)
        draft.put(
            "data.sources",
            [source | {"weight": share} for source, share in zip(found, shares, strict=True)],
        )
        if strategy == "interleave_over":
            draft.put("data.stopping_strategy", "all_exhausted")
        if strategy == "concat":
            draft.note(
                "dataset: data.sources mixes them in equal shares until the first is used up; "
                "LLaMA-Factory appends them to each other: set weights, and data.stopping_strategy"
            )
    hold_out(draft, "eval_dataset", found, held_out, "train")
    if size := draft.take("val_size"):
        draft.put("data.test_size", size if size < 1 else int(size))
    if draft.take("streaming"):
        draft.put("data.streaming", True)
        draft.move("buffer_size", "data.shuffle_buffer_size", 16384)
    draft.put("data.max_length", draft.take("cutoff_len", 2048))
    draft.move("preprocessing_num_workers", "data.dataset_num_proc")
    draft.move("tokenized_path", "data.cache_dir")
    neat, packs = draft.take("neat_packing"), draft.take("packing")
    if neat or packs:
        draft.put("data.packing", True)
        if not neat:
            draft.note("packing: true: examples of a row do not attend to each other here")
    if draft.take("train_on_prompt"):
        draft.put("data.assistant_only_loss", False)
    if draft.take("mask_history"):
        draft.put("data.train_on", "last")
    if (template := draft.take("template")) is not None:
        draft.note(
            f"template: {template} was not taken over: the checkpoint's own chat template is used, "
            "or data.chat_template_path"
        )
    if (kernel := draft.take("flash_attn")) not in (None, "auto"):
        draft.note(f"flash_attn: {kernel} was not taken over: auto picks a kernel of JAX")


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _dataset(draft: Draft, name: str, folder: Path, path: Path) -> dict[str, Any]:
    """The path, format and columns of a data set that dataset_info.json names."""
    infos = [base / "dataset_info.json" for base in (folder, path.parent / folder)]
    info = next((file for file in infos if file.is_file()), None)
    if info is None:
        draft.note(f"dataset: there is no {infos[0]} that says where {name} is; set its path")
        return {"path": name}
    entry = read_json_object(info).get(name)
    if entry is not None and not isinstance(entry, dict):
        raise UserError(f"{info}: {name}: expected an object, not a {type(entry).__name__}")
    if entry is None:
        draft.note(f"dataset: {info} does not name {name}; set its path")
        return {"path": name}
    file = entry.pop("file_name", None)
    found = {"path": str(info.parent / file) if file else entry.pop("hf_hub_url", name)}
    for theirs, ours in (("subset", "name"), ("split", "split"), ("num_samples", "max_samples")):
        if (value := entry.pop(theirs, None)) is not None:
            found[ours] = value
    found["format"] = _FORMATS.get(entry.pop("formatting", "alpaca"), "auto")
    columns = entry.pop("columns", {})
    known = {_COLUMNS[key]: column for key, column in columns.items() if key in _COLUMNS}
    if known and found["format"] != "auto":
        found["columns"] = known
    draft.note_rest(f"dataset {name}", entry)
    draft.note_rest(f"dataset {name}", {k: v for k, v in columns.items() if k not in _COLUMNS})
    return found
