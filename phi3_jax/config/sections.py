"""The sections of a config: typed, strict models.

Keys are named as in Hugging Face's `TrainingArguments`, `SFTConfig` and PEFT's `LoraConfig` where
the meaning is the same, so existing recipes can be copied over. The descriptions below are the only
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
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of frozen weights and activations; `auto` is float32 on CPU, else bfloat16.",
    )
    attn_implementation: Literal["auto", "xla", "splash", "cudnn"] = Field(
        "auto",
        description="`splash` is a kernel for TPUs, for rows of a multiple of 128 tokens, `cudnn` "
        "one for GPUs, in 16 bits; `auto` takes the one that runs, else `xla`.",
    )
    quantized_matmul: Literal["auto", "xla", "pallas"] = Field(
        "auto",
        description="How weights of 4 bits are multiplied: `pallas` dequantizes in a kernel, on "
        "one TPU or GPU; `auto` measures there which is faster, at the start; else it is `xla`.",
    )
    quantization: QuantizationConfig | None = Field(
        None, description="Keep the weights of dense layers in 4 or 8 bits (QLoRA):"
    )

    @property
    def bitsandbytes(self) -> BitsAndBytesConfig | None:
        """How the weights are quantized, if they are."""
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

    def to_lora(self) -> LoraConfig:
        """Convert to the form `lora_flax` takes; typed code reads the keys from there.

        Raises:
            LoraError: a value that pydantic accepts but LoRA cannot use, such as no target.
        """
        return LoraConfig(**self.model_dump(exclude={"adapter_name_or_path"}))


class TrainingConfig(Section):
    """How to train."""

    output_dir: str = Field(
        min_length=1, description="Folder for everything that the run leaves behind."
    )
    seed: int = Field(42, ge=0, lt=2**31, description="Of data order, dropout and the start of A.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    max_steps: int = Field(
        -1, ge=-1, description="Optimizer steps, whatever num_train_epochs says; -1 goes by that."
    )
    per_device_train_batch_size: int = Field(
        8, ge=1, description="Rows of a micro-batch, times mesh.data and mesh.fsdp."
    )
    per_device_eval_batch_size: int = Field(
        8, ge=1, description="Rows of an evaluation batch, likewise."
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Micro-batches of a step; 4 x 2 gives what a batch of 8 gives."
    )
    learning_rate: float = Field(2e-4, ge=0, description="Highest learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Decay after the warm-up, to 0 at the last step."
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="Warm-up, a share of all steps.")
    warmup_steps: int = Field(0, ge=0, description="Warm-up, in steps.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta2.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    loraplus_lr_ratio: float = Field(
        1.0, gt=0, description="Learning rate of B over that of A (LoRA+); 1 is plain LoRA."
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Clip the norm of the trainable gradients to this; 0 does not clip."
    )
    label_smoothing_factor: float = Field(
        0.0, ge=0, lt=1, description="Probability spread over the vocabulary (label smoothing)."
    )
    z_loss: float = Field(
        0.0, ge=0, description="Weight of log(Z)^2 in the loss; 1e-4 keeps logits from drifting."
    )
    gradient_checkpointing: bool = Field(
        True, description="Recompute each layer in the backward pass: a third of the memory."
    )
    remat_policy: Literal["full", "dots", "offload"] = Field(
        "full",
        description="What gradient_checkpointing recomputes: each layer, all but the matmuls, or "
        "as `dots` with those kept in the host's memory.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="A loss or gradient that is not finite stops the run, or skips the step.",
    )
    logging_steps: int = Field(10, ge=1, description="Log every so many steps.")
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Evaluate every so many steps; with held-out rows the run is evaluated at its "
        "start and end in any case.",
    )
    save_steps: int | None = Field(
        None, ge=1, description="Checkpoint every so many steps; the last step always is one."
    )
    save_total_limit: int | None = Field(
        None, ge=1, description="Keep so many checkpoints; the best one is kept besides."
    )
    load_best_model_at_end: bool = Field(
        False, description="Export the checkpoint with the lowest held-out loss."
    )
    report_to: list[Literal["tensorboard", "wandb", "none"]] = Field(
        ["tensorboard"], description="Where metrics go besides metrics.jsonl."
    )
    run_name: str | None = Field(None, description="Name of the run in wandb.")
    sample_prompts: list[str] = Field(
        [], description="User messages that are answered before and after training."
    )
    sample_max_new_tokens: int = Field(64, ge=1, description="Length of those answers.")

    @property
    def remat(self) -> Remat:
        """What the backward pass recomputes, in the network's terms."""
        return self.remat_policy if self.gradient_checkpointing else "none"

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class SweepConfig(Section):
    """Several adapters trained at once over one base, one for every combination of the lists."""

    learning_rate: list[PositiveFloat] = Field(
        [], description="Values of training.learning_rate; empty: the one there."
    )
    lora_alpha: list[PositiveFloat] = Field([], description="Values of peft.lora_alpha.")
    r: list[PositiveInt] = Field([], description="Values of peft.r.")
    seed: list[NonNegativeInt] = Field([], description="Values of training.seed.")

    @property
    def values(self) -> dict[str, list[float]]:
        """The lists that are not empty."""
        return {name: values for name, values in self.model_dump().items() if values}


class MeshConfig(Section):
    """The devices: how many along each axis; 1 if not named, and -1, on one axis, for all others.

    With no axis named the run takes all devices: the weights are copied where a copy takes at most
    half of a device's memory, else cut up as little as that takes.
    """

    data: int | None = Field(None, ge=-1, description="Copies of the model, each with other rows.")
    fsdp: int | None = Field(
        None, ge=-1, description="Weights cut up, gathered where used; other rows too."
    )
    tensor: int | None = Field(None, ge=-1, description="Each matmul cut up.")

    @property
    def sizes(self) -> tuple[int, int, int] | None:
        """Sizes of the three axes; None to choose automatically."""
        given = (self.data, self.fsdp, self.tensor)
        if given == (None, None, None):
            return None
        data, fsdp, tensor = (1 if size is None else size for size in given)
        return data, fsdp, tensor
