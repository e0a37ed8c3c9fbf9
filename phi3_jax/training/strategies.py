"""When a run logs, evaluates, saves and stops, as HF's `Trainer` does with the same settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from phi3_jax.config.training import TrainingConfig
from phi3_jax.errors import UserError

# Metrics of an evaluation by step, as `InProgress.evaluations` has them for each member.
Evaluations = Mapping[int, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Strategies:
    """The steps of a run at which something is due.

    Attributes:
        log, evaluate, save: every how many steps; None is never.
        save_best: whether to save after an evaluation that is the best so far.
    """

    log: int | None
    evaluate: int | None
    save: int | None
    save_best: bool

    @classmethod
    def of(cls, config: TrainingConfig, planned: int, steps_per_epoch: int) -> Strategies:
        """The strategies of a run of `planned` steps, before those of `extend`.

        Raises:
            UserError: `load_best_model_at_end`, but some checkpoints would have no evaluation.
        """

        def every(strategy: str, steps: float | None) -> int | None:
            if strategy == "epoch":
                return steps_per_epoch
            if strategy != "steps" or steps is None:
                return None
            return math.ceil(planned * steps) if steps < 1 else int(steps)

        found = cls(
            every(config.logging_strategy, config.logging_steps),
            every(config.evaluation_strategy, config.evaluation_steps),
            every(config.saving_strategy, config.saving_steps),
            config.saving_strategy == "best",
        )
        if config.load_best_model_at_end and found.save and found.evaluate:
            if found.save % found.evaluate:
                raise UserError(
                    f"training.save_steps: {config.saving_steps} of {planned} steps is every "
                    f"{found.save} and eval_steps {config.evaluation_steps} every "
                    f"{found.evaluate}: load_best_model_at_end needs a multiple, so that every "
                    "checkpoint is evaluated"
                )
        return found


def is_due(every: int | None, step: int) -> bool:
    """Whether an action taken every `every` steps is due after a step; None is never."""
    return every is not None and step > 0 and step % every == 0


@dataclasses.dataclass(frozen=True)
class Best:
    """Which of two evaluations is better.

    Attributes:
        metric: a key of their records, such as `eval_loss`.
        greater: whether a greater value is better.
    """

    metric: str
    greater: bool

    @classmethod
    def of(cls, config: TrainingConfig) -> Best:
        """As `metric_for_best_model` and `greater_is_better` say."""
        return cls(config.best_metric, config.greater_wins)

    def value(self, record: Mapping[str, float]) -> float | None:
        """The metric of a record; None if it is missing or not finite."""
        value = record.get(self.metric)
        return value if value is not None and math.isfinite(value) else None

    def beats(self, value: float, other: float, by: float = 0.0) -> bool:
        """Whether a value is better than another, by more than `by`."""
        return (value > other if self.greater else value < other) and abs(value - other) > by

    def choose(self, records: Evaluations) -> int | None:
        """The step of the best record, the first one of equals; None if none has the metric."""
        best: tuple[int, float] | None = None
        for step, record in sorted(records.items()):
            value = self.value(record)
            if value is not None and (best is None or self.beats(value, best[1])):
                best = step, value
        return None if best is None else best[0]

    def choose_saved(self, records: Mapping[int, Mapping[str, Any]]) -> int | None:
        """The step of the best checkpoint, by the records of all; None if none was evaluated.

        Only metrics of the same held-out rows as the last one's are compared. A step that was saved
        because the run ended there competes only while it is the last: a longer run would not have
        saved it.
        """
        last = max(records, default=0)
        return self.choose(
            {
                step: record["metrics"]
                for step, record in records.items()
                if record["held_out"] == records[last]["held_out"]
                and (step == last or record.get("due", True))
            }
        )


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """HF's `EarlyStoppingCallback`, computed from all evaluations of the run so far.

    It has no state of its own, so a resumed run stops where an uninterrupted one would.

    Attributes:
        best: what is better.
        patience: evaluations in a row without improvement after which the run stops.
        threshold: an improvement must exceed this.
    """

    best: Best
    patience: int
    threshold: float

    @classmethod
    def of(cls, config: TrainingConfig) -> EarlyStopping | None:
        """As the config says; None without `early_stopping_patience`."""
        if config.early_stopping_patience is None:
            return None
        threshold = config.early_stopping_threshold
        return cls(Best.of(config), config.early_stopping_patience, threshold)

    def stops(self, evaluations: Evaluations, every: int | None) -> bool:
        """Whether the run stops after the last of its regular evaluations, every `every` steps."""
        counter, known = 0, None
        for step in sorted(evaluations):
            if not is_due(every, step):
                continue
            if self.best.metric not in evaluations[step]:
                continue  # as HF does; a resumed run may have another metric
            value = self.best.value(evaluations[step])
            improved = value is not None and (
                known is None or self.best.beats(value, known, self.threshold)
            )
            counter = 0 if improved else counter + 1
            if value is not None and (known is None or self.best.beats(value, known)):
                known = value
        return counter >= self.patience
