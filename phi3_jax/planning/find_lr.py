"""Find a learning rate: train several at once for a few steps, and compare held-out losses."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.config.loader import RunConfig, load_config
from phi3_jax.config.training import TrainingConfig
from phi3_jax.errors import UserError
from phi3_jax.quickstart import local_paths
from phi3_jax.training.progress import NonFiniteError
from phi3_jax.training.setup import mesh_of
from phi3_jax.training.sweep.members import sweep_members
from phi3_jax.training.sweep.run import train_sweep

STEPS = 20
RATES = 5
# Share of the steps after which the worse half of the rates stops.
HALVED_AT = 0.4
# Share of the training rows set aside where nothing is held out, and at most how many rows.
HELD_OUT, HELD_OUT_ROWS = 0.05, 32


@dataclasses.dataclass(frozen=True)
class FoundRate:
    """The result of a search.

    Attributes:
        losses: held-out loss after the last step, by learning rate; nan if it is not finite or
            was not measured.
        best: the rate with the lowest loss.
        steps: steps that the rates were trained for.
        stopped: the step after which a rate stopped, by learning rate.
    """

    losses: dict[float, float]
    best: float
    steps: int
    stopped: dict[float, int] = dataclasses.field(default_factory=dict)

    @property
    def edge(self) -> str | None:
        """Which end of the rates the best one is: `lowest`, `highest`, or neither."""
        if self.best == max(self.losses):
            return "highest"
        return "lowest" if self.best == min(self.losses) else None


def rates_around(rate: float, count: int = RATES) -> list[float]:
    """Rates of the series 1e-4, 3e-4, 1e-3, ... with the one nearest to `rate` in the middle."""
    series = [float(f"{digit}e{power}") for power in range(-12, 3) for digit in (1, 3)]
    nearest = min(range(len(series)), key=lambda i: abs(math.log(series[i] / rate)))
    first = max(nearest - count // 2, 0)
    return series[first : first + count]


def own_batch(config: RunConfig, mesh: Mapping[str, int], members: int) -> dict[str, object]:
    """What gives each member of a sweep the batch of the run.

    A sweep spreads its members over `data`, so each accumulates the rows that the run takes at once
    there.

    Args:
        config: the run's config.
        mesh: sizes of the axes of the run's mesh.
        members: their number.
    """
    rows = config.training.gradient_accumulation_steps * mesh["data"]
    found: dict[str, object] = {"training.gradient_accumulation_steps": rows}
    if config.mesh.sizes is not None:
        found |= {f"mesh.{axis}": size for axis, size in mesh.items()}
        found["mesh.data"] = min(mesh["data"], members)
    return found


def search_overrides(
    config: RunConfig, rates: Sequence[float], steps: int, mesh: Mapping[str, int]
) -> list[str]:
    """What turns a run into a search: a short sweep of the rates that leaves nothing behind.

    Args:
        config: the run's config.
        rates: the learning rates.
        steps: optimizer steps of the search.
        mesh: sizes of the axes of the run's mesh.
    """
    shortened: dict[str, object] = {
        "training.max_steps": steps,
        "training.extend": "null",
        "training.warmup_ratio": 0,
        # Not as many as in the run: they would be most of these few steps.
        "training.warmup_steps": math.ceil(steps / 10),
        "training.logging_steps": math.ceil(steps / 4),
        "training.logging_strategy": "steps",
        "training.eval_strategy": "no",
        "training.eval_steps": "null",
        "training.eval_generate": "false",
        "training.save_strategy": "no",
        "training.save_steps": "null",
        "training.load_best_model_at_end": "false",
        "training.metric_for_best_model": "null",
        "training.early_stopping_patience": "null",
        "training.push_to_hub": "false",
        "training.hub_strategy": "end",
        "training.report_to": "none",
        "training.profile_steps": "null",
        "training.sample_prompts": "[]",
        "training.log_first_row": "false",
        "sweep.learning_rate": list(rates),
        "sweep.stop": [math.ceil(steps * HALVED_AT)] if len(rates) > 2 and steps > 2 else [],
        "sweep.keep": 0.5,
    }
    training, data = config.training, config.data
    shortened |= own_batch(config, mesh, len(rates))
    if training.lr_scheduler_type == "warmup_stable_decay":
        shortened["training.lr_scheduler_kwargs"] = _stages(training, steps)
    shortened["data.max_test_samples"] = min(data.max_test_samples or HELD_OUT_ROWS, HELD_OUT_ROWS)
    if data.test_path is None and data.test_split is None and data.test_size is None:
        shortened["data.test_size"] = HELD_OUT
    return [f"{key}={value}" for key, value in shortened.items()]


def _stages(training: TrainingConfig, steps: int) -> str:
    """The settings of `warmup_stable_decay`, whose decay is at most the last half of the steps."""
    settings = training.lr_scheduler_settings
    settings["num_decay_steps"] = max(1, min(settings["num_decay_steps"], steps // 2))
    settings["num_stable_steps"] = None
    return json.dumps(settings)


def find_lr(
    path: str | Path, overrides: Sequence[str], rates: Sequence[float], steps: int = STEPS
) -> FoundRate:
    """Train one adapter with each rate for a few steps, and compare held-out losses.

    The adapters train at once (`train_sweep`) in a temporary folder. The schedule is the run's own,
    over `steps` steps, with a tenth of them as warm-up, and so is the batch. The worse half of
    three or more rates stops after two fifths of the steps.

    Args:
        path, overrides: the run's config, as in `load_config`.
        rates: at least two learning rates.
        steps: optimizer steps.

    Raises:
        UserError: the config is not one of a single run, or not one that a sweep can train; or no
            rate has a finite loss.
        Interrupted: a signal arrived.
    """
    config = load_config(path, overrides)
    if config.sweep.values:
        raise UserError("--find-lr: the config has a sweep of its own; remove it")
    named = local_paths(config)
    mesh = mesh_of(named, Checkpoint.open(named.model.path, named.model.revision))
    with tempfile.TemporaryDirectory(prefix="temporary-find-lr-") as folder:
        own = search_overrides(config, rates, steps, mesh.shape)
        own.append(f"training.output_dir={folder}/run")
        search = load_config(path, [*overrides, *own])
        try:
            result = train_sweep(search, keep=False)
        except NonFiniteError as error:
            raise UserError(f"--find-lr: {error}") from None
    names = {m.name: m.config.training.learning_rate for m in sweep_members(search)}
    found = {rate: result.losses.get(name, math.nan) for name, rate in names.items()}
    finite = {rate: loss for rate, loss in found.items() if math.isfinite(loss)}
    if not finite:
        raise UserError("--find-lr: no rate has a finite held-out loss; try lower --rates")
    stopped = {names[name]: step for name, step in result.stopped.items()}
    return FoundRate(found, min(finite, key=lambda rate: finite[rate]), steps, stopped)
