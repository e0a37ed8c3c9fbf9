"""The sections of a config: typed, strict models.

Keys are named as in Hugging Face's `TrainingArguments`, `SFTConfig` and PEFT's `LoraConfig` where
the meaning is the same, so existing recipes can be copied over. The descriptions are the only
documentation of the keys: `phi3-jax train --help` and docs/config.md print them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from lora_flax import BitsAndBytesConfig, LoraConfig
from phi3_jax.config.derived import keys_of
from phi3_jax.config.schedules import SCHEDULES, ScheduleName
from phi3_jax.model.config import RopeFactors
from phi3_jax.model.network import Remat


class Section(BaseModel):
    """Strict: no unknown key, no string for a number, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


@keys_of(BitsAndBytesConfig)
class QuantizationConfig(Section):
    """Frozen weights in 4 or 8 bits (QLoRA)."""

    def to_bitsandbytes(self) -> BitsAndBytesConfig:
        """Convert to the form `lora_flax` takes.

        Raises:
            LoraError: neither 4 nor 8 bits, or both.
        """
        return BitsAndBytesConfig(**self.model_dump())


class ModelConfig(Section):
    """The base model."""

    path: str = Field(
        min_length=1, description="Folder of a Hugging Face Phi-3 checkpoint, or a hub id."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype of the frozen weights and activations; `auto` is float32 on CPU and "
        "bfloat16 elsewhere.",
    )
    attn_implementation: Literal["auto", "xla", "splash", "cudnn"] = Field(
        "auto",
        description="`splash` is a TPU kernel for rows whose length is a multiple of 128 tokens; "
        "`cudnn` is a GPU kernel for 16-bit dtypes; `auto` picks the one that runs here, or `xla` "
        "if neither does.",
    )
    quantized_matmul: Literal["auto", "xla", "pallas"] = Field(
        "auto",
        description="How 4-bit weights are multiplied. `pallas` dequantizes inside a kernel, on a "
        "single TPU or GPU. `auto` benchmarks both there at startup and uses `xla` elsewhere.",
    )
    rope_factors: RopeFactors = Field(
        "by_text",
        description="Which of LongRoPE's factors apply. `by_text`: the long ones to texts beyond "
        "the original length, as in transformers for one text; `by_batch`: to all rows of a batch "
        "with such a text, as in transformers for a batch; `short` and `long`: always these. vLLM "
        "and llama.cpp choose by the size of their context: use `long` for an adapter that they "
        "will serve with a longer one.",
    )
    quantization: QuantizationConfig | None = Field(
        None, description="Store the weights of dense layers in 4 or 8 bits (QLoRA):"
    )

    @property
    def bitsandbytes(self) -> BitsAndBytesConfig | None:
        """How to quantize the weights; None leaves them unquantized."""
        return None if self.quantization is None else self.quantization.to_bitsandbytes()


@keys_of(
    LoraConfig,
    # The recipe of Microsoft's sample_finetune.py for Phi-3. The defaults of `LoraConfig` are those
    # of PEFT: r 8, lora_alpha 8, no dropout, and no targets. The ranges are checked here as well so
    # that these errors are listed together with those of other sections.
    settings={
        "r": {"default": 16, "ge": 1},
        "lora_alpha": {"default": 32, "gt": 0},
        "lora_dropout": {"default": 0.05, "ge": 0, "lt": 1},
        "target_modules": {"default": "all-linear"},
    },
    notes={
        "target_modules": "Phi-3's dense layers are qkv_proj, o_proj, gate_up_proj and down_proj; "
        "q_proj, k_proj, v_proj, gate_proj and up_proj are slices of the fused ones, each with its "
        "own A and B.",
        "layers_pattern": "In Phi-3 that is `layers`.",
        "bias": "Phi-3 has none.",
        "init_lora_weights": "`eva` and `qera` use the first 8 batches of the run.",
        "modules_to_save": "For example `lm_head` and `embed_tokens`.",
    },
    without=("fan_in_fan_out",),
)
class PeftConfig(Section):
    """The adapter."""

    adapter_name_or_path: str | None = Field(
        None,
        description="A PEFT adapter (folder or hub id) to continue training. Its rank, alpha and "
        "targets replace the ones below.",
    )
    adapter_revision: str | None = Field(
        None, description="Branch, tag or commit of that adapter, if it is a hub id."
    )
    keep_rslora: bool = Field(
        False,
        description="Write an adapter trained with use_rslora as rsLoRA. By default the file is "
        "plain LoRA with the same scale, which llama.cpp and SGLang read correctly too.",
    )

    def to_lora(self) -> LoraConfig:
        """Convert to the form `lora_flax` takes; typed code reads the keys from there.

        Raises:
            LoraError: a value that pydantic accepts but LoRA cannot use, such as no target.
        """
        own = {"adapter_name_or_path", "adapter_revision", "keep_rslora"}
        return LoraConfig(**self.model_dump(exclude=own))


class TrainingConfig(Section):
    """How to train."""

    output_dir: str = Field(
        min_length=1,
        description="Folder for everything the run writes; may be `gs://BUCKET/FOLDER`.",
    )
    seed: int = Field(
        42, ge=0, lt=2**31, description="Seed of data order, dropout and initialization."
    )
    num_train_epochs: float = Field(1.0, gt=0, description="Number of passes over the data.")
    max_steps: int = Field(
        -1,
        ge=-1,
        lt=2**31,
        description="Number of optimizer steps, overriding num_train_epochs; -1 trains for "
        "num_train_epochs.",
    )
    extend: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps to add to a run, with --resume also to one that has finished. "
        "They have a schedule of their own: warmup, peak and decay as in a run of that length.",
    )
    per_device_train_batch_size: int = Field(
        8,
        ge=1,
        description="Rows per micro-batch and device; the global micro-batch is this times "
        "mesh.data times mesh.fsdp.",
    )
    per_device_eval_batch_size: int = Field(
        8, ge=1, description="Rows per evaluation batch and device."
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Micro-batches per step. Accumulating 4 micro-batches of 2 rows gives the same "
        "gradients as one batch of 8.",
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = Field(
        "random",
        description="Order of the training rows: random, or random groups of rows of similar "
        "length, which need less padding.",
    )
    learning_rate: float = Field(2e-4, ge=0, description="Peak learning rate.")
    lr_scheduler_type: ScheduleName = Field(
        "linear",
        description="Decay after warmup, as in transformers, but that `constant` warms up too, "
        "like `constant_with_warmup`. `linear` and `cosine` reach 0 at the last step.",
    )
    lr_scheduler_kwargs: dict[str, int | float | str | None] = Field(
        {},
        description="Settings of the schedule, with transformers' names: `min_lr` or `min_lr_rate` "
        "(cosine_with_min_lr), `num_cycles` (cosine, cosine_with_restarts), `lr_end` and `power` "
        "(polynomial), `timescale` (inverse_sqrt), `num_decay_steps`, `num_stable_steps`, "
        "`warmup_type`, `decay_type`, `min_lr_ratio` (warmup_stable_decay).",
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="Warmup, as a fraction of all steps.")
    warmup_steps: float = Field(
        0, ge=0, description="Warmup, as a number of steps; below 1, as a fraction of all steps."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    weight_decay_on_all: bool = Field(
        False,
        description="Decay biases and norm weights too; HF's Trainer, like the default here, does "
        "not.",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta2.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    loraplus_lr_ratio: float = Field(
        1.0,
        gt=0,
        description="Ratio of B's learning rate to A's (LoRA+); 1 is plain LoRA.",
    )
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        description="Clip the global norm of the trainable gradients to this; 0 disables clipping.",
    )
    label_smoothing_factor: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Label smoothing: probability mass spread evenly over the vocabulary.",
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of log(Z)^2 in the loss; 1e-4 keeps the logits from drifting.",
    )
    gradient_checkpointing: bool = Field(
        True,
        description="Recompute activations in the backward pass, which cuts memory to about a "
        "third.",
    )
    remat_policy: Literal["full", "dots", "offload"] = Field(
        "full",
        description="What gradient_checkpointing recomputes: `full` the whole of each layer, "
        "`dots` everything but the matmuls; `offload` is `dots` with the matmul results kept in "
        "host memory.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="What to do when the loss or a gradient is not finite: stop the run, or skip "
        "the step.",
    )
    log_first_row: bool = Field(
        True, description="Print the first training row at the start, with what is learned of it."
    )
    logging_steps: int = Field(10, ge=1, description="Log every N steps.")
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Evaluate every N steps. A run with held-out rows is always evaluated at its "
        "start and end.",
    )
    save_steps: int | None = Field(
        None,
        ge=1,
        description="Save a checkpoint every N steps. The last step always saves one.",
    )
    save_total_limit: int | None = Field(
        None,
        ge=1,
        description="Keep only the last N checkpoints, in addition to the best one.",
    )
    load_best_model_at_end: bool = Field(
        False, description="Export the checkpoint with the lowest held-out loss."
    )
    report_to: list[Literal["tensorboard", "wandb", "none"]] = Field(
        ["tensorboard"], description="Where to send metrics, in addition to metrics.jsonl."
    )
    push_to_hub: bool = Field(
        False,
        description="Upload the adapter to the Hugging Face hub at the end. The token comes from "
        "`hf auth login` or HF_TOKEN. A push that fails is reported and does not fail the run.",
    )
    hub_model_id: str | None = Field(
        None, min_length=1, description="Repository for push_to_hub, such as USER/NAME."
    )
    hub_private_repo: bool | None = Field(
        None,
        description="Make a new repository private (true) or public (false); null is the "
        "account's default.",
    )
    run_name: str | None = Field(None, description="Name of the run in wandb.")
    sample_prompts: list[str] = Field(
        [], description="User messages that the model answers before and after training."
    )
    sample_max_new_tokens: int = Field(
        64, ge=1, lt=2**31, description="Maximum length of those answers."
    )

    @property
    def lr_scheduler_settings(self) -> dict[str, Any]:
        """All settings of the schedule, with its defaults filled in."""
        settings = SCHEDULES[self.lr_scheduler_type]
        return settings.model_validate(self.lr_scheduler_kwargs).model_dump()

    @property
    def remat(self) -> Remat:
        """What the backward pass recomputes, as an argument of the network."""
        return self.remat_policy if self.gradient_checkpointing else "none"

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class SweepConfig(Section):
    """Several adapters trained at once on one base, one for each combination of the lists.

    A key without a list has the value from its own section.
    """

    learning_rate: list[PositiveFloat] = Field([], description="Values of training.learning_rate.")
    lora_alpha: list[PositiveFloat] = Field([], description="Values of peft.lora_alpha.")
    r: list[PositiveInt] = Field([], description="Values of peft.r.")
    seed: list[NonNegativeInt] = Field([], description="Values of training.seed.")

    @property
    def values(self) -> dict[str, list[float]]:
        """The non-empty lists."""
        return {name: values for name, values in self.model_dump().items() if values}


class MeshConfig(Section):
    """Number of devices along each mesh axis.

    An axis that is not set has size 1; at most one axis can be -1, which takes all remaining
    devices. If no axis is set, the run uses all devices: the weights are replicated if a copy fits
    in half of a device's memory, and otherwise sharded over as few devices as make them fit.
    """

    data: int | None = Field(
        None, ge=-1, description="Data parallelism: replicas of the model, each with its own rows."
    )
    fsdp: int | None = Field(
        None,
        ge=-1,
        description="Fully sharded data parallelism: weights are sharded and gathered where they "
        "are used; each device has its own rows.",
    )
    tensor: int | None = Field(
        None, ge=-1, description="Tensor parallelism: each matmul is split over the devices."
    )

    @property
    def sizes(self) -> tuple[int, int, int] | None:
        """Sizes of the three axes; None to choose automatically."""
        given = (self.data, self.fsdp, self.tensor)
        if given == (None, None, None):
            return None
        data, fsdp, tensor = (1 if size is None else size for size in given)
        return data, fsdp, tensor
