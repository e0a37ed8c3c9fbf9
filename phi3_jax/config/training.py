"""The section `training` of a config: how to train."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from phi3_jax.config.optimizers import NAMES, OPTIMIZERS, name_problem, parse_args
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
    optim: str = Field(
        "adamw_torch",
        description="Optimizer, by transformers' name: `adamw_torch`, `adafactor`, `lion_32bit`, "
        "`ademamix`, `sgd`, `adagrad`, `rmsprop`, `schedule_free_adamw`, `schedule_free_sgd`; also "
        "`prodigy`, `muon`, and `lora_muon`. The fused, paged, 4-bit and 8-bit names are the plain "
        "optimizers with their state in float32.",
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
    log_first_row: bool = Field(
        True, description="Print the first training row at the start, with what is learned of it."
    )
    logging_strategy: Literal["no", "steps", "epoch"] = Field(
        "steps",
        description="When to log: every logging_steps, at the end of each epoch, or never. The "
        "first and the last step are always logged.",
    )
    logging_steps: int | float = Field(
        10, gt=0, description="Log every N steps; below 1, a fraction of all steps."
    )
    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None,
        description="When to evaluate: every eval_steps (or logging_steps, if that is null), at "
        "the end of each epoch, or never; null is `steps` if eval_steps is set. A run with "
        "held-out rows is always evaluated at its start and end.",
    )
    eval_steps: int | float | None = Field(
        None, gt=0, description="Evaluate every N steps; below 1, a fraction of all steps."
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = Field(
        None,
        description="When to save a checkpoint: every save_steps (500 if that is null), at the end "
        "of each epoch, after every evaluation that is the best so far, or never; null is `steps` "
        "if save_steps is set. The last step always saves one.",
    )
    save_steps: int | float | None = Field(
        None, gt=0, description="Save a checkpoint every N steps; below 1, a fraction of all steps."
    )
    save_total_limit: int | None = Field(
        None,
        ge=1,
        description="Keep only the last N checkpoints, in addition to the best one.",
    )
    load_best_model_at_end: bool = Field(
        False, description="Export the best checkpoint instead of the last."
    )
    metric_for_best_model: str | None = Field(
        None,
        description="Metric of an evaluation that says which checkpoint is best, with or without "
        "`eval_`: `eval_perplexity`, `eval_mean_token_accuracy`, one of eval_generate; null is "
        "`eval_loss`.",
    )
    greater_is_better: bool | None = Field(
        None,
        description="Whether a greater metric_for_best_model is better; null is false for the loss "
        "and the perplexity and true for the others.",
    )
    eval_generate: bool = Field(
        False,
        description="Answer held-out questions at every evaluation and log `eval_rouge1`, "
        "`eval_rouge2`, `eval_rougeL`, `eval_rougeLsum`, `eval_exact_match` and `eval_token_f1` of "
        "the answers, times 100, as `phi3-jax evaluate` measures them.",
    )
    eval_generate_max_questions: int | None = Field(
        None, ge=1, description="Answer only the first N questions; null answers all."
    )
    eval_generate_max_new_tokens: int = Field(
        64, ge=1, lt=2**31, description="Maximum length of an answer."
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluations in a row in which metric_for_best_model did "
        "not improve, as HF's EarlyStoppingCallback does; null never stops early.",
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="How much the metric must improve to count."
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

    @property
    def evaluation_strategy(self) -> str:
        """`eval_strategy` with null resolved."""
        return self.eval_strategy or ("no" if self.eval_steps is None else "steps")

    @property
    def evaluation_steps(self) -> float:
        """Steps between evaluations with the strategy `steps`."""
        return self.logging_steps if self.eval_steps is None else self.eval_steps

    @property
    def saving_strategy(self) -> str:
        """`save_strategy` with null resolved."""
        return self.save_strategy or ("no" if self.save_steps is None else "steps")

    @property
    def saving_steps(self) -> float:
        """Steps between checkpoints with the strategy `steps`."""
        return 500 if self.save_steps is None else self.save_steps

    @property
    def best_metric(self) -> str:
        """`metric_for_best_model` with its prefix, as in the records of evaluations."""
        return f"eval_{(self.metric_for_best_model or 'loss').removeprefix('eval_')}"

    @property
    def greater_wins(self) -> bool:
        """`greater_is_better` with null resolved."""
        if self.greater_is_better is None:
            return self.best_metric not in ("eval_loss", "eval_perplexity")
        return self.greater_is_better

    @field_validator("logging_steps", "eval_steps", "save_steps")
    @classmethod
    def _whole_or_a_share(cls, value: float | None) -> float | None:
        if isinstance(value, float) and value >= 1 and value != int(value):
            raise ValueError(f"{value:g} must be an integer, or a fraction of all steps below 1")
        return value

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
