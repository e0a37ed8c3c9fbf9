"""What makes two runs the same, so that a checkpoint of one may continue in the other."""

from __future__ import annotations

import json
import math
from typing import Any

from phi3_jax.config.loader import RunConfig
from phi3_jax.errors import at_most_ten

# Keys that say how the rows of a step are spread; only their number must stay.
ROW_KEYS = (
    "mesh.data",
    "mesh.fsdp",
    "mesh.sequence",
    "mesh.tensor",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
)
# Keys that may change on resume: they do not affect the weights, or something else in the identity
# covers them (fingerprints, the rows of a step). Held-out rows are part of a stream's fingerprint.
# docs/training.md has the same list.
FREE_KEYS = {
    "model.path",
    "model.revision",
    "model.attn_implementation",
    "model.quantized_matmul",
    "model.lora_matmul",
    "data.path",
    "data.revision",
    "data.test_path",
    "data.test_split",
    "data.max_test_samples",
    "data.eval_packing",
    "data.dataset_num_proc",
    "data.cache_dir",
    "training.output_dir",
    "training.extend",
    "training.gradient_checkpointing",
    "training.remat_policy",
    "training.per_device_eval_batch_size",
    "training.on_nonfinite",
    "training.log_first_row",
    "training.logging_strategy",
    "training.logging_steps",
    "training.eval_strategy",
    "training.eval_steps",
    "training.save_strategy",
    "training.save_steps",
    "training.save_total_limit",
    "training.load_best_model_at_end",
    "training.metric_for_best_model",
    "training.greater_is_better",
    "training.eval_generate",
    "training.eval_generate_max_questions",
    "training.eval_generate_max_new_tokens",
    "training.early_stopping_patience",
    "training.early_stopping_threshold",
    "training.push_to_hub",
    "training.hub_model_id",
    "training.hub_strategy",
    "training.hub_private_repo",
    "training.report_to",
    "training.project",
    "training.run_name",
    "training.profile_steps",
    "training.price_per_hour",
    "training.sample_prompts",
    "training.sample_max_new_tokens",
} | set(ROW_KEYS)


def run_identity(
    config: RunConfig,
    base: str,
    data: str,
    held_out: str | None,
    devices: int,
    choices: dict[str, str],
    planned: int,
) -> dict[str, Any]:
    """Everything that must match for a checkpoint to belong to this run, as JSON values.

    Args:
        config: the run's config.
        base: fingerprint of the base model.
        data: fingerprint of the training examples.
        held_out: fingerprint of the held-out examples, which must match where they choose the
            checkpoint that is exported.
        devices: number of devices that the rows of a batch are spread over.
        choices: what `auto` means here (`Setup.choices`). It need not match; what the config names
            itself does.
        planned: steps before `training.extend`, which may change until a step of it is taken.
    """
    free = set(FREE_KEYS)
    if config.peft.to_lora().init_lora_weights == "eva":
        free -= set(ROW_KEYS)  # its ranks come from the micro-batches of the first steps
    settings = {
        f"{section}.{key}": value
        for section, values in config.model_dump().items()
        for key, value in values.items()
        if f"{section}.{key}" not in free
    }
    # Round-trip through JSON, which turns tuples into lists.
    settings = json.loads(json.dumps(settings))
    # What is evaluated then chooses the steps that are exported or taken.
    training = config.training
    best = training.load_best_model_at_end or training.early_stopping_patience or config.sweep.stop
    return {
        "base": base,
        "data": data,
        "held_out": held_out,
        "chooses_best": bool(best),
        "rows": [
            config.training.per_device_train_batch_size,
            devices,
            config.training.gradient_accumulation_steps,
        ],
        # Rematerialization only moves rounding, so that any choice may continue another.
        "asked": {key: getattr(config.model, key, "auto") for key in choices},
        "choices": choices,
        "planned": planned,
        "extend": config.training.extend,
        "settings": settings,
    }


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Why a checkpoint with the identity `saved` does not belong to the run `now`; empty if so."""
    problems = []
    data = "different training data"
    if now["settings"].get("data.streaming") and saved["held_out"] != now["held_out"]:
        # Which of them it has is not known before it was read to its end.
        data += (
            ", for a stream leaves out the held-out rows, which are others now (data.test_path, "
            "data.test_split, data.max_test_samples)"
        )
    fingerprints = [("base", "a different base model"), ("data", data)]
    if now["chooses_best"]:  # the held-out rows decide what is exported
        fingerprints.append(("held_out", "different held-out rows"))
    for name, what in fingerprints:
        if saved[name] != now[name]:
            verb = "evaluated" if name == "held_out" else "trained"
            problems.append(f"it was {verb} on {what}")
    if problem := _rows_problem(saved["rows"], now["rows"]):
        problems.append(problem)
    for key, choice in now["choices"].items():
        if now["asked"][key] != "auto" and saved["choices"].get(key) != choice:
            problems.append(f"model.{key} was {saved['choices'].get(key)!r} and is {choice!r}")
    if saved["extend"] != now["extend"] and saved["step"] > now["planned"]:
        problems.append(
            f"training.extend was {saved['extend']} and is now {now['extend']}, but step "
            f"{saved['step']} is one of the added ones, whose learning rates depend on it"
        )
    before, after = saved["settings"], now["settings"]
    for key in sorted(before.keys() | after.keys()):
        # A key that is free now may have been settled in an older version.
        if before.get(key) != after.get(key) and not (key in FREE_KEYS and key not in after):
            problems.append(f"{key} was {before.get(key)!r} and is now {after.get(key)!r}")
    return problems


def _rows_problem(before: list[int], now: list[int]) -> str:
    """What is wrong if a step has another number of rows now, and which values fit."""
    wanted = math.prod(before)
    if wanted == math.prod(now):
        return ""
    per_device, devices, accumulation = now
    names = "per_device_train_batch_size x devices x gradient_accumulation_steps"
    was, is_now = (" x ".join(map(str, rows)) for rows in (before, now))
    problem = f"a step had {wanted} rows ({names} = {was}) and has {math.prod(now)} now ({is_now})"
    if wanted % devices:
        fitting = [n for n in range(1, wanted + 1) if wanted % n == 0]
        listed = ", ".join(at_most_ten(map(str, fitting)))
        return f"{problem}: {wanted} rows need a mesh with data x fsdp of one of {listed}"
    each = wanted // devices
    values = per_device if each % per_device == 0 else math.gcd(each, per_device)
    if each % per_device and each % accumulation == 0:
        values = each // accumulation
    return (
        f"{problem}: set training.per_device_train_batch_size={values} and "
        f"training.gradient_accumulation_steps={each // values}"
    )
