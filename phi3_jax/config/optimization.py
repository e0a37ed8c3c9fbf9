"""The keys of `training` that decide what a step computes: rows, schedule, optimizer, and loss."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from phi3_jax.config.optimizers import NAMES, OPTIMIZERS, name_problem, parse_args
from phi3_jax.config.schedules import SCHEDULES, ScheduleName
from phi3_jax.config.sections import Section, Seed
from phi3_jax.model.remat import Remat, Saved


class Optimization(Section):
    """What a step computes."""

    seed: Seed = Field(42, description="Seed of data order, dropout and initialization.")
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
        lt=2**31,
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
        0,
        ge=0,
        lt=2**31,
        description="Warmup, as a number of steps; below 1, as a fraction of all steps.",
    )
    optim: str = Field(
        "adamw_torch",
        description="Optimizer, by transformers' name: `adamw_torch`, `adafactor`, `lion_32bit`, "
        "`ademamix`, `sgd`, `adagrad`, `rmsprop`, `stable_adamw`, `schedule_free_adamw`, "
        "`schedule_free_sgd`, `schedule_free_radam`; also `prodigy`, `muon`, and `lora_muon`. The "
        "fused, paged, 4-bit and 8-bit names are the plain optimizers with their state in float32.",
    )
    optim_args: dict[str, int | float | bool | str | None] = Field(
        {},
        description="Settings of the optimizer, as a mapping or as HF's text "
        "`key=value,key=value`: `clip_threshold` and `decay_rate` (adafactor), `beta3`, `alpha`, "
        "`t_alpha` and `t_beta3` (ademamix), `momentum` and `nesterov` (sgd), `eps` (adagrad), "
        "`alpha`, `eps`, `momentum` and `centered` (rmsprop), `weight_lr_power` (schedule_free_*), "
        "`beta3`, `d0`, `d_coef` and `safeguard_warmup` (prodigy), `momentum`, `nesterov` and "
        "`ns_steps` (muon), `momentum` (lora_muon).",
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Weight decay, decoupled from the gradient; sgd, adagrad and rmsprop add it to "
        "the gradient, as in torch.",
    )
    weight_decay_on_all: bool = Field(
        False,
        description="Decay biases and norm weights too; HF's Trainer, like the default here, does "
        "not.",
    )
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="AdamW's beta1, also Lion's and of the other variants of Adam."
    )
    adam_beta2: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="AdamW's beta2, also Lion's and of the other variants of Adam.",
    )
    adam_epsilon: float = Field(
        1e-8, gt=0, description="AdamW's epsilon, also of the other optimizers that have one."
    )
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
    loss_type: Literal["nll", "dft"] = Field(
        "nll",
        description="Training loss: negative log-likelihood, or `dft` (Dynamic Fine-Tuning), which "
        "weighs each target's with its probability, as in TRL. Held-out losses are always the "
        "former.",
    )
    neftune_noise_alpha: float | None = Field(
        None,
        ge=0,
        description="NEFTune: uniform noise of this size, over the root of the number of values in "
        "a row, on the embeddings while training; 5 is usual, null adds none.",
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
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in the backward pass instead of keeping them. `auto` "
        "keeps as many of the values that remat_policy can list as the device's memory holds.",
    )
    remat_policy: Literal["full", "dots", "offload"] | list[Saved] = Field(
        "full",
        description="What `gradient_checkpointing: true` recomputes: `full` the whole of each "
        "layer, `dots` everything but the matmuls; `offload` is `dots` with the matmul results "
        "kept in host memory. A list names what is kept: `attention` (its output and the sums of "
        "its softmax), `residual` (the residual stream after attention), `qkv`, `gate_up`.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="What to do when the loss or a gradient is not finite: stop the run, or skip "
        "the step.",
    )

    @property
    def optimizer(self) -> str:
        """What is computed under the name `optim`, a key of `OPTIMIZERS`."""
        return NAMES[self.optim]

    @property
    def optimizer_settings(self) -> Any:
        """All settings of the optimizer, an instance of its class with the defaults filled in."""
        return OPTIMIZERS[self.optimizer].settings.model_validate(self.optim_args)

    @property
    def lr_scheduler_settings(self) -> dict[str, Any]:
        """All settings of the schedule, with its defaults filled in."""
        settings = SCHEDULES[self.lr_scheduler_type]
        return settings.model_validate(self.lr_scheduler_kwargs).model_dump()

    @property
    def remat(self) -> Remat | Literal["auto"]:
        """What the backward pass recomputes, as an argument of the network, or `auto`."""
        if self.gradient_checkpointing == "auto":
            return "auto"
        if not self.gradient_checkpointing:
            return "none"
        policy = self.remat_policy
        return tuple(policy) if isinstance(policy, list) else policy

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if problem := name_problem(value):
            raise ValueError(problem)
        return value

    @field_validator("optim_args", mode="before")
    @classmethod
    def _text_is_a_mapping(cls, value: Any) -> Any:
        if value is None:
            return {}
        return parse_args(value) if isinstance(value, str) else value
