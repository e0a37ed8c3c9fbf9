"""The section `training` of a config: how to train."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from phi3_jax.config.schedules import SCHEDULES, ScheduleName
from phi3_jax.config.sections import Section
from phi3_jax.model.remat import Remat, Saved


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
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow", "none"]] = Field(
        ["tensorboard"], description="Where to send metrics, in addition to metrics.jsonl."
    )
    push_to_hub: bool = Field(
        False,
        description="Upload the adapter to the Hugging Face hub, at the end or as `hub_strategy` "
        "says. The token comes from `hf auth login` or HF_TOKEN. A push that fails is reported and "
        "does not fail the run.",
    )
    hub_model_id: str | None = Field(
        None, min_length=1, description="Repository for push_to_hub, such as USER/NAME."
    )
    hub_strategy: Literal["end", "every_save"] = Field(
        "end",
        description="When push_to_hub uploads: at the end, or also at every checkpoint, in the "
        "background.",
    )
    hub_private_repo: bool | None = Field(
        None,
        description="Make a new repository private (true) or public (false); null is the "
        "account's default.",
    )
    project: str | None = Field(
        None,
        min_length=1,
        description="Project of the run in wandb and Trackio, and experiment in MLflow; null is "
        "the tracker's own default (phi3-jax in Trackio).",
    )
    run_name: str | None = Field(
        None, description="Name of the run in the trackers; by default that of its folder."
    )
    profile_steps: list[PositiveInt] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="First and last step of a trace for XProf and Perfetto, such as [10, 13], "
        "written to output_dir/profile.",
    )
    price_per_hour: float | None = Field(
        None,
        ge=0,
        description="What an hour of all devices costs, in dollars; the report then has the run's "
        "cost.",
    )
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
    def remat(self) -> Remat | Literal["auto"]:
        """What the backward pass recomputes, as an argument of the network, or `auto`."""
        if self.gradient_checkpointing == "auto":
            return "auto"
        if not self.gradient_checkpointing:
            return "none"
        policy = self.remat_policy
        return tuple(policy) if isinstance(policy, list) else policy

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"{value}: the first step comes after the last")
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
