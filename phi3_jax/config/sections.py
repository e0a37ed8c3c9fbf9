"""The sections of a config: typed, strict models.

Keys are named as in Hugging Face's `TrainingArguments`, `SFTConfig` and PEFT's `LoraConfig` where
the meaning is the same, so existing recipes can be copied over. The descriptions are the only
documentation of the keys: `phi3-jax train --help` and docs/config.md print them.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
)

from lora_flax import BitsAndBytesConfig, LoraConfig
from phi3_jax.config.derived import keys_of
from phi3_jax.model.config import RopeFactors

Seed = Annotated[int, Field(ge=0, lt=2**31)]


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
    lora_matmul: Literal["auto", "xla", "pallas"] = Field(
        "auto",
        description="How layers with LoRA are multiplied in training. `pallas` adds the update "
        "inside the base's matmul, on TPUs, for one adapter over weights that are not quantized. "
        "`auto` benchmarks both there at startup and uses `xla` elsewhere.",
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
        min_length=1,
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


class SweepConfig(Section):
    """Several adapters trained at once on one base, one for each combination of the lists.

    A key without a list has the value from its own section. On several devices, mesh.data spreads
    the members, each of which has the rows of a run with mesh.data 1.
    """

    learning_rate: list[PositiveFloat] = Field([], description="Values of training.learning_rate.")
    lora_alpha: list[PositiveFloat] = Field([], description="Values of peft.lora_alpha.")
    r: list[PositiveInt] = Field([], description="Values of peft.r.")
    seed: list[Seed] = Field([], description="Values of training.seed.")
    stop: list[PositiveInt] = Field(
        [],
        description="Steps after which the members with the highest held-out losses stop "
        "(successive halving); all are evaluated there. A member that stopped has no adapter.",
    )
    keep: float = Field(
        0.5, gt=0, lt=1, description="Share of the members that each such step keeps, rounded up."
    )

    @property
    def values(self) -> dict[str, list[float]]:
        """The non-empty lists of what the members differ in."""
        found: dict[str, list[float]] = self.model_dump(exclude={"stop", "keep"})
        return {name: values for name, values in found.items() if values}

    @property
    def count(self) -> int:
        """The number of members; 1 without lists, for a run that is not a sweep."""
        return math.prod(len(values) for values in self.values.values())


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
    sequence: int | None = Field(
        None,
        ge=-1,
        description="Context parallelism for long rows: each row is cut along its tokens, and the "
        "weights are sharded over these devices too. data.max_length and data.pad_to_multiple_of "
        "must be multiples of twice this number (with splash attention, of 256 times).",
    )
    tensor: int | None = Field(
        None, ge=-1, description="Tensor parallelism: each matmul is split over the devices."
    )

    @property
    def sizes(self) -> dict[str, int] | None:
        """Sizes of the axes, as arguments of `make_mesh`; None to choose automatically."""
        given: dict[str, int | None] = self.model_dump()
        if all(size is None for size in given.values()):
            return None
        return {name: 1 if size is None else size for name, size in given.items()}
