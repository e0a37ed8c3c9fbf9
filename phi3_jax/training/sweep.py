"""Train several adapters at once on one frozen base, compare them, and report the best.

Every combination of the lists in `sweep:` is a member. One compiled step runs all of them and reads
each base weight once. Each member has its own metrics and exports its own PEFT adapter, the same
one a separate run would produce.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import lora_flax
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import Batch, BatchPlan
from phi3_jax.errors import UserError
from phi3_jax.evaluation.held_out import held_out_metrics
from phi3_jax.sharding.mesh import place, row_devices
from phi3_jax.training.checkpoints import Checkpoints, run_identity
from phi3_jax.training.interrupt import Interrupted, collect_signals
from phi3_jax.training.metrics import MetricsWriter, Terminal, Window, eval_record
from phi3_jax.training.optimizer import learning_rate_schedule, make_optimizer, total_steps
from phi3_jax.training.output import check_output, export_adapter
from phi3_jax.training.setup import Setup, loss_settings, set_up
from phi3_jax.training.step import (
    StepMetrics,
    TrainState,
    jit_sweep_eval_step,
    jit_sweep_step,
)

_SECTION = {"learning_rate": "training", "seed": "training", "lora_alpha": "peft", "r": "peft"}


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep: its name, such as `learning_rate=0.0001,r=8`, and its config."""

    name: str
    config: RunConfig


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The result of a finished sweep.

    Attributes:
        adapters: folder of each member's PEFT adapter, keyed by name.
        losses: held-out loss of each member after the last step, or its training loss if nothing
            is held out.
        best: name of the member with the lowest loss.
    """

    adapters: dict[str, Path]
    losses: dict[str, float]
    best: str


def sweep_members(config: RunConfig) -> list[Member]:
    """Every combination of the lists, in order, with the last list varying fastest."""
    lists = config.sweep.values
    members = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        update: dict[str, Any] = {"sweep": type(config.sweep)()}
        for section in ("training", "peft"):
            own = {k: v for k, v in chosen.items() if _SECTION[k] == section}
            update[section] = getattr(config, section).model_copy(update=own)
        name = ",".join(f"{key}={value:g}" for key, value in chosen.items())
        folder = str(Path(config.training.output_dir) / name)
        update["training"] = update["training"].model_copy(update={"output_dir": folder})
        members.append(Member(name, config.model_copy(update=update)))
    return members


def train_sweep(config: RunConfig, resume: bool = False) -> SweepResult:
    """Train all members of the sweep and export their adapters.

    A member with a non-finite loss or gradient skips that step and continues, whatever
    `on_nonfinite` says, so that it does not stop the others.

    Args:
        config: a config with lists in `sweep`.
        resume: continue from the last checkpoint in `training.output_dir`.

    Raises:
        UserError, lora_flax.LoraError: bad input.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    if jax.process_count() > 1:
        raise UserError(f"a sweep runs in one process, and these are {jax.process_count()}")
    output = Path(config.training.output_dir).expanduser()
    check_output(output, resume)
    sweep = Sweep(set_up(config), output, resume)
    try:
        lora_flax.write_atomically(output / "config.yaml", sweep.setup.config.to_yaml())
        return sweep.train()
    finally:
        sweep.close()


class Sweep:
    """A sweep in progress: like `loop.Run`, with a leading axis of N on the trainable arrays.

    Args:
        setup: the loaded run; its model has no adapter yet.
        output: the sweep's folder, with a subfolder per member.
        resume: start from the last checkpoint in `output`.
    """

    def __init__(self, setup: Setup, output: Path, resume: bool):
        self.setup, self.output = setup, output
        self.config = config = setup.config.training
        self.members = sweep_members(setup.config)
        runs = [member.config for member in self.members]
        seeds = [run.training.seed for run in runs]
        self.many = lora_flax.wrap_many(
            setup.model, [run.peft.to_lora() for run in runs], [nnx.Rngs(seed) for seed in seeds]
        )
        devices = row_devices(setup.mesh)
        self.plan = BatchPlan.from_config(setup.config.data, config, devices)
        self.batches = {seed: self.plan.train_batches(setup.train.examples, seed) for seed in seeds}
        steps_per_epoch = self.batches[seeds[0]].steps_per_epoch
        self.total_steps = total_steps(config, steps_per_epoch)
        # Updates are computed with a learning rate of 1, then scaled by each member's rate.
        unit = config.model_copy(update={"learning_rate": 1.0})
        tx = make_optimizer(unit, self.total_steps)
        self.schedule = learning_rate_schedule(unit, self.total_steps)
        self.rates = jnp.array([run.training.learning_rate for run in runs], jnp.float32)
        self.seeds = jnp.array(seeds, jnp.uint32)
        # Placed the way a step returns it; otherwise the second step would recompile.
        self.state = place(
            TrainState(self.many.trainable, jax.vmap(tx.init)(self.many.trainable)),
            NamedSharding(setup.mesh, PartitionSpec()),
        )
        remat = config.remat
        self.train_step = jit_sweep_step(
            self.many.graphdef, tx, remat, len(self.batches) == 1, loss_settings(config)
        )
        self.eval_step = jit_sweep_eval_step(self.many.graphdef)
        identity = run_identity(setup.config, setup.checkpoint.fingerprint, setup.data)
        self.checkpoints = Checkpoints(output / "checkpoints", config.save_total_limit, identity)
        self.step = self.checkpoints.latest() or 0 if resume else 0
        if self.step:
            self.state = self.checkpoints.restore(self.step, self.state)
        self.writers = []
        for run in runs:
            folder = Path(run.training.output_dir).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            lora_flax.write_atomically(folder / "config.yaml", run.to_yaml())
            self.writers.append(MetricsWriter(run, folder, self.step if resume else None))
        self.terminal = Terminal(self.total_steps, self.step)
        self.evaluations = [writer.evaluations() for writer in self.writers]
        self.losses = [math.nan] * len(runs)

    def train(self) -> SweepResult:
        """Run the remaining steps and export the adapters."""
        self.terminal.print(self.setup.describe())
        self.terminal.print(
            f"{len(self.members)} adapters at once: {'; '.join(m.name for m in self.members)}"
        )
        if not self.step:
            self._evaluate()
        windows = [Window() for _ in self.members]
        with collect_signals() as received:
            while self.step < self.total_steps:
                self._take_step(windows)
                if self._due(self.config.eval_steps) or self.step == self.total_steps:
                    self._evaluate()
                if self._due(self.config.save_steps) or received:
                    self.checkpoints.save(self.step, self.state, None)
                if received:
                    raise Interrupted(received[0], self.step)
                for window in windows:
                    window.start()
        if any(self.step not in known for known in self.evaluations):
            self._evaluate()
        self.checkpoints.save(self.step, self.state, None)
        return self._export()

    def close(self) -> None:
        """Close all files and the terminal."""
        self.terminal.close()
        for writer in self.writers:
            writer.close()
        self.checkpoints.close()

    def _take_step(self, windows: list[Window]) -> None:
        of_seed = {seed: batches[self.step] for seed, batches in self.batches.items()}
        own = [of_seed[member.config.training.seed] for member in self.members]
        batch = own[0] if len(self.batches) == 1 else _stacked(own)
        self.state, metrics = self.train_step(
            self.state,
            self.many.constants,
            self.many.frozen,
            batch,
            jnp.int32(self.step),
            self.seeds,
            self.rates,
        )
        metrics = jax.device_get(metrics)
        self.step += 1
        for index, window in enumerate(windows):
            window.add(_member(metrics, index), own[index])
        self._report(metrics, windows)

    def _report(self, metrics: StepMetrics, windows: list[Window]) -> None:
        factor = float(self.schedule(self.step - 1))
        speed = sum(window.tokens_per_second for window in windows)
        shown = {"loss": float(np.min(metrics.loss)), "learning_rate": factor}
        self.terminal.step(self.step, shown | {"tokens_per_second": speed})
        if self.step % self.config.logging_steps and self.step not in (1, self.total_steps):
            return
        line: dict[str, float] = {}
        for index, (member, window) in enumerate(zip(self.members, windows, strict=True)):
            record = window.take() | {
                "grad_norm": float(metrics.grad_norm[index]),
                "learning_rate": factor * member.config.training.learning_rate,
                "epoch": self.step / next(iter(self.batches.values())).steps_per_epoch,
            }
            self.losses[index] = record.get("loss", math.nan)
            line[f"loss of {member.name}:"] = self.losses[index]
            self.writers[index].write(self.step, record)
        self.terminal.log(self.step, line | {"tokens_per_second": speed})

    def _evaluate(self) -> None:
        """Measure held-out metrics of every member; a no-op without held-out data."""
        if self.setup.test is None:
            return
        many = self.many
        found = held_out_metrics(
            lambda batch: self.eval_step(self.state.trainable, many.constants, many.frozen, batch),
            self.plan.eval_batches(self.setup.test.examples),
        )
        line = {}
        for index, (member, own) in enumerate(zip(self.members, found, strict=True)):
            record = eval_record(own)
            self.evaluations[index][self.step] = record
            self.writers[index].write(self.step, record)
            line[f"eval_loss of {member.name}:"] = record["eval_loss"]
        self.terminal.log(self.step, line)

    def _export(self) -> SweepResult:
        """Write every adapter and sweep.json with the comparison, and report the best."""
        many = dataclasses.replace(self.many, trainable=self.state.trainable)
        adapters, losses = {}, {}
        for index, member in enumerate(self.members):
            known = self.evaluations[index]
            lora_flax.put_one(self.setup.model, many, index)
            adapter = self.output / member.name / "adapter"
            results = {f"after {s} steps": known[s] for s in (0, self.step) if s in known}
            export_adapter(self.setup, member.config, adapter, results)
            adapters[member.name] = adapter
            losses[member.name] = known.get(self.step, {}).get("eval_loss", self.losses[index])
        best = min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
        what = "eval_loss" if self.setup.test is not None else "loss"
        rows = [
            {"name": name, what: None if math.isnan(loss) else loss, "adapter": str(adapters[name])}
            for name, loss in sorted(losses.items(), key=lambda item: item[1])
        ]
        summary = {"best": best, "members": rows}
        lora_flax.write_atomically(self.output / "sweep.json", json.dumps(summary, indent=2) + "\n")
        for row in rows:
            mark = "best" if row["name"] == best else "    "
            self.terminal.print(f"{mark}  {what} {losses[str(row['name'])]:.4f}  {row['name']}")
        self.terminal.print(f"adapter: {adapters[best]}")
        return SweepResult(adapters, losses, best)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0


def _member(metrics: StepMetrics, index: int) -> StepMetrics:
    return jax.tree.map(lambda value: value[index], metrics)


def _stacked(batches: list[Batch]) -> Batch:
    """Stack batches `[A, B, S]` of unequal S into one `[N, A, B, S]`, padding the shorter ones."""
    length = max(batch["tokens"].shape[-1] for batch in batches)

    def widen(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, 0), (0, 0), (0, length - array.shape[-1])])

    return {name: np.stack([widen(batch[name]) for batch in batches]) for name in batches[0]}
