"""The section `training` of a config: where a run writes, and what it does beside its steps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from phi3_jax.config.optimization import Optimization


class TrainingConfig(Optimization):
    """How to train."""

    output_dir: str = Field(
        min_length=1,
        description="Folder for everything the run writes; may be `gs://BUCKET/FOLDER`.",
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
