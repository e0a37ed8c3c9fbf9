"""A comparison of the config keys with Hugging Face's config classes, as a page of the docs.

`python -m phi3_jax.config.compare > docs/settings.md` writes the page. A test compares the lists of
fields with the installed libraries.
"""

from __future__ import annotations

from typing import NamedTuple

from phi3_jax.config.foreign import MISSING, NOT_APPLICABLE, OTHER_NAMES
from phi3_jax.config.optimizers import NAMES, REFUSED, plain_name
from phi3_jax.config.run import SECTIONS
from phi3_jax.config.sections import QuantizationConfig

HEADER = """# Settings of Hugging Face

Every field of the config classes of transformers 5.24, TRL 1.16 and PEFT 0.21, and what it is
here. [config.md](config.md) describes the keys; `phi3-jax convert-config` translates whole files of
TRL, LLaMA-Factory and Axolotl ([training.md](training.md#configs-of-other-programs)).

This page is generated from the code: `python -m phi3_jax.config.compare > docs/settings.md`.
"""


class Class(NamedTuple):
    """A config class: its library, the prefixes of the keys with its names, and its fields."""

    library: str
    prefixes: tuple[str, ...]
    fields: str


CLASSES: dict[str, Class] = {
    "TrainingArguments": Class(
        "transformers",
        ("training.",),
        """
        output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
        lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay
        adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
        average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16
        bf16_full_eval fp16_full_eval tf32 activation_checkpointing
        activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
        torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
        liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps
        auto_find_batch_size logging_strategy logging_steps logging_first_step
        log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
        log_level_replica disable_tqdm report_to run_name project trackio_space_id
        trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
        per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
        eval_use_gather_object eval_accumulation_steps include_for_metrics
        batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node
        save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo
        hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
        metric_for_best_model greater_is_better ignore_data_skip
        restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
        accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
        label_names train_sampling_strategy length_column_name ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
        fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict
        resume_from_checkpoint local_rank
        """,
    ),
    "SFTConfig": Class(
        "TRL, in addition to those of TrainingArguments",
        ("training.", "data."),
        """
        model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path
        dataset_text_field dataset_kwargs dataset_num_proc eos_token max_length
        truncation_mode shuffle_dataset packing packing_strategy padding_free
        pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss loss_type
        activation_offloading pad_token
        """,
    ),
    "LoraConfig": Class(
        "PEFT",
        ("peft.",),
        """
        task_type peft_type auto_mapping peft_version base_model_name_or_path revision
        inference_mode r target_modules exclude_modules lora_alpha lora_dropout
        fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform
        layers_pattern rank_pattern alpha_pattern megatron_config megatron_core
        trainable_token_indices loftq_config eva_config corda_config lora_ga_config use_dora
        velora_config alora_invocation_tokens use_qalora qalora_group_size monteclora_config
        layer_replication runtime_config lora_bias target_parameters use_bdlora arrow_config
        kasa_config ensure_weight_tying
        """,
    ),
    "BitsAndBytesConfig": Class(
        "transformers",
        ("model.quantization.",),
        """
        load_in_8bit load_in_4bit llm_int8_threshold llm_int8_skip_modules
        llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight bnb_4bit_compute_dtype
        bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage
        """,
    ),
}
# What differs in a field that has the same name here.
NOTES: dict[str, str] = {
    "output_dir": "required",
    "learning_rate": "default 2e-4",
    "num_train_epochs": "default 1",
    "lr_scheduler_type": "`constant` warms up too",
    "optim": "see [optimizers](#optimizers) for every name",
    "gradient_checkpointing": "default auto",
    "logging_steps": "default 10",
    "eval_strategy": "default `steps` if eval_steps is set; always at the start and the end",
    "save_strategy": "default `steps` if save_steps is set; always at the end",
    "hub_strategy": "`end` (default) or `every_save`",
    "greater_is_better": "false by default for the perplexity too",
    "report_to": "`tensorboard`, `wandb`, `trackio`, `mlflow`, `none`; default tensorboard",
    "pad_to_multiple_of": "default 128",
    "assistant_only_loss": "default true, also for completions",
    "max_length": "null is not possible",
    "r": "default 16",
    "lora_alpha": "default 32",
    "lora_dropout": "default 0.05",
    "target_modules": "default all-linear; slices of fused projections too",
    "init_lora_weights": "no corda, lora_ga; qera in addition",
    "bnb_4bit_quant_type": "default nf4",
    "load_in_8bit": "weights in 8 bits; activation outliers are not kept in 16",
}


def same_name(field: str, prefixes: tuple[str, ...]) -> str | None:
    """The key with a field's own name, if there is one."""
    for prefix in prefixes:
        if prefix == "model.quantization.":
            known = field in QuantizationConfig.model_fields
        else:
            known = field in SECTIONS[prefix.rstrip(".")].model_fields
        if known:
            return prefix + field
    return None


def state_of(field: str, prefixes: tuple[str, ...]) -> tuple[str, str]:
    """What a field is here (yes, other name, not applicable, missing), and its key or the reason.

    Raises:
        KeyError: nothing is known about it.
    """
    if key := same_name(field, prefixes):
        note = NOTES.get(field)
        return "yes", f"`{key}`" + (f": {note}" if note else "")
    elsewhere = [f"{s}.{field}" for s, model in SECTIONS.items() if field in model.model_fields]
    if field in OTHER_NAMES or elsewhere:
        return "other name", f"`{OTHER_NAMES.get(field) or elsewhere[0]}`"
    if field in NOT_APPLICABLE:
        return "not applicable", NOT_APPLICABLE[field]
    return "missing", MISSING[field]


def compare() -> str:
    """The page without its header."""
    lines = []
    for name, (library, prefixes, fields) in CLASSES.items():
        lines += [f"## {name}", "", f"{library}.", "", "| field | here | |", "| --- | --- | --- |"]
        for field in fields.split():
            state, what = state_of(field, prefixes)
            lines.append(f"| `{field}` | {state} | {what} |")
        lines.append("")
    return "\n".join([*lines, *optimizers()]).rstrip()


def optimizers() -> list[str]:
    """A section with every name of `optim`, and why it is refused if it is."""
    lines = ["## Optimizers", "", "Names of `optim`, and what is computed under them."]
    lines += ["", "| `optim` | here | |", "| --- | --- | --- |"]
    for name, kind in NAMES.items():
        plain = plain_name(kind)
        same = "" if plain == name else f"`{plain}` with its state in float32"
        lines.append(f"| `{name}` | yes | {same} |")
    lines += [f"| `{name}` | refused | {reason} |" for name, reason in REFUSED.items()]
    return [*lines, ""]


if __name__ == "__main__":
    print(HEADER)
    print(compare())
