"""A sweep in progress: its steps, metrics, evaluations, and which members continue."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_flax
from phi3_jax.config.sections import SweepConfig
from phi3_jax.data.batches import Batch, Batches
from phi3_jax.evaluation.loss import LossSums
from phi3_jax.sharding.mesh import MEMBER, batch_sharding, place
from phi3_jax.sharding.rules import State
from phi3_jax.training.metrics import step_record
from phi3_jax.training.optimizer import update_counts
from phi3_jax.training.progress import Fetched, Flight, InProgress
from phi3_jax.training.step import StepMetrics, TrainState
from phi3_jax.training.sweep.groups import Group, grouped
from phi3_jax.training.sweep.halving import stopped_after
from phi3_jax.training.sweep.members import Member

T = TypeVar("T")


class Placed(NamedTuple):
    """A group on the mesh: its members' numbers, the same as an array (None: all), their rows."""

    numbers: list[int]
    members: np.ndarray | None
    batch: Batch


@dataclasses.dataclass(kw_only=True)
class Sweep(InProgress):
    """Like `loop.Run`, with a leading axis of N on the trainable arrays.

    Attributes:
        sweep: the section of the config.
        members: the N runs.
        mesh: the device mesh, with the axis `member`.
        batches: the batch of each step, keyed by seed.
        schedule: the learning rate at a step, with a peak of 1.
        train_step, eval_step: the compiled steps (`jit_sweep_step`, `jit_sweep_eval_step`).
        constants, frozen: the arrays that do not train, with and without the leading axis.
        losses: training loss of each member in its last record; NaN before the first.
        stopped: members that have stopped early, and the step after which each did.
        skipped: steps of each member with a non-finite loss or gradient, which the schedule of its
            learning rate does not count; of no use once it has stopped.
        seeds, rates: each member's seed and learning rate; padded like the stack.
    """

    sweep: SweepConfig
    members: list[Member]
    mesh: Mesh
    batches: dict[int, Batches]
    schedule: optax.Schedule
    train_step: Callable[..., tuple[TrainState, StepMetrics]]
    eval_step: Callable[..., LossSums]
    constants: Any
    frozen: Any
    losses: list[float]
    stopped: dict[int, int] = dataclasses.field(init=False)
    skipped: list[int] = dataclasses.field(init=False)
    seeds: np.ndarray = dataclasses.field(init=False)
    rates: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stopped = self._stopped()
        updates = lora_flax.on_host(update_counts(self.state.opt_state))
        self.skipped = [self.step - int(count) for count in updates[: len(self.members)]]
        runs = [member.config.training for member in self.members]
        runs += runs[:1] * (self._padded(len(runs)) - len(runs))
        self.seeds = np.array([run.seed for run in runs], np.uint32)
        self.rates = np.array([run.learning_rate for run in runs], np.float32)

    def active(self) -> list[int]:
        """The members that are still in training."""
        return [index for index in range(len(self.members)) if index not in self.stopped]

    def fetch(self) -> Fetched:
        """Build the next step's batches: one for all members with the same seed."""
        active = self.active()
        seeds = [self.members[index].config.training.seed for index in active]
        of_seed = {seed: self.batches[seed][self.step] for seed in seeds}
        own = [of_seed[seed] for seed in seeds]
        groups = grouped(active, own, self.mesh.shape[MEMBER])
        return Fetched(own, [self._placed(group, leading=1) for group in groups])

    def take_step(self, placed: list[Placed]) -> tuple[TrainState, StepMetrics]:
        """Dispatch the compiled step of each group; the metrics are those of all, in order."""
        state, step, found = self.state, np.int32(self.step), []
        for group in placed:
            state, metrics = self.train_step(
                state, self.constants, self.frozen, group.batch, group.members, step,
                self.seeds, self.rates,
            )  # fmt: skip
            found.append((group, metrics))
        return state, _in_order(found)

    def read(self, flight: Flight) -> None:
        """Read a step's metrics, waiting for it to finish, and show them."""
        metrics, active = jax.device_get(flight.metrics), self.active()
        for row, (index, batch) in enumerate(zip(active, flight.members, strict=True)):
            own = _member(metrics, row)
            self.windows[index].add(own, batch)
            self.skipped[index] += not own.finite
        shown = {"loss": float(np.min(metrics.loss))}
        shown["learning_rate"] = max(self._factor(index, flight.step) for index in active)
        self.terminal.step(flight.step, shown | {"tokens_per_second": self._speed()})

    def log(self, flight: Flight) -> None:
        """Write each member's record of the steps since its last one, and print them together."""
        metrics, active = jax.device_get(flight.metrics), self.active()
        line = {"tokens_per_second": self._speed()}
        for row, index in enumerate(active):
            run = self.members[index].config.training
            rate = self._factor(index, flight.step) * run.learning_rate
            epoch = self.batches[run.seed].epoch(flight.step)
            own = step_record(_member(metrics, row), rate, epoch)
            record = self.windows[index].take() | own
            if self.skipped[index]:
                record["skipped_steps"] = self.skipped[index]
            self.losses[index] = record.get("loss", math.nan)
            for name in ("tflops_per_second", "utilization"):
                if name in record:
                    line[name] = line.get(name, 0.0) + record[name]
            self.writers[index].write(flight.step, record)
        self.terminal.log(flight.step, line)
        losses = {self.members[index].name: self.losses[index] for index in active}
        self.terminal.compare(flight.step, "loss", losses)

    def is_logged(self, step: int) -> bool:
        """Also the last step of members that stop early."""
        return super().is_logged(step) or step in self.sweep.stop

    def is_evaluation_due(self) -> bool:
        """Whether the members are evaluated after this step."""
        return super().is_evaluation_due() or self.step in self.sweep.stop

    def evaluate(self) -> None:
        """Measure held-out metrics of the members in training, and stop some if this is the step.

        Raises:
            Interrupted: a signal arrived; a checkpoint is saved.
        """
        super().evaluate()
        stopped = self._stopped()
        if new := [index for index in stopped if index not in self.stopped]:
            self.stopped = stopped
            self.fetched = None  # it has rows of members that have stopped
            names = "; ".join(self.members[index].name for index in new)
            left = len(self.active())
            self.terminal.print(f"stopped after step {self.step}: {names}; {left} continue")

    def loss_sums(self, weights: State, batch: Batch) -> LossSums:
        """The held-out loss sums of one batch `[B, S]`, one of each member in training."""
        active = self.active()
        groups = grouped(active, [batch] * len(active), self.mesh.shape[MEMBER])
        found = []
        for group in groups:
            placed = self._placed(group, leading=0)
            sums = self.eval_step(
                weights, self.constants, self.frozen, placed.batch, placed.members
            )
            found.append((placed, sums))
        return _in_order(found)

    def log_evaluation(self, records: list[dict[str, float]]) -> None:
        """Print the held-out loss of each member in training."""
        pairs = zip(self.active(), records, strict=True)
        losses = {self.members[index].name: record["eval_loss"] for index, record in pairs}
        self.terminal.compare(self.step, "eval_loss", losses)

    def save(self) -> None:
        """Write a checkpoint of all members, without held-out metrics: no step is best for all."""
        count = len(self.members)
        with self.record.during("saving"):
            self.record.write(self.step)
            state: TrainState = jax.tree.map(lambda array: array[:count], self.state)
            self.checkpoints.save(self.step, state, {})

    def _speed(self) -> float:
        """Tokens per second of all members."""
        return sum(self.windows[index].tokens_per_second for index in self.active())

    def _factor(self, index: int, step: int) -> float:
        """A member's share of its peak learning rate in the step that was read last."""
        return float(self.schedule(max(step - self.skipped[index] - 1, 0)))

    def _stopped(self) -> dict[int, int]:
        names = [member.name for member in self.members]
        return stopped_after(self.sweep, names, self.evaluations, self.step)

    def _padded(self, count: int) -> int:
        """That many members, rounded up to a multiple of the devices they are spread over."""
        devices = self.mesh.shape[MEMBER]
        return int(-(-count // devices) * devices)

    def _placed(self, group: Group, leading: int) -> Placed:
        """A group on the mesh, padded by a number past the stack's last and a copy of rows."""
        count, stack = len(group.members), self._padded(len(self.members))
        extra = self._padded(count) - count
        members = None
        if group.members != list(range(len(self.members))):
            members = np.array([*group.members, *[stack] * extra], np.int32)
        batch, sharding = group.batch, batch_sharding(self.mesh, leading)
        if batch["tokens"].ndim > 2 + leading:
            batch = {
                name: np.concatenate([array, np.repeat(array[:1], extra, axis=0)])
                for name, array in batch.items()
            }
            sharding = NamedSharding(self.mesh, PartitionSpec(MEMBER, *sharding.spec))
        return Placed(group.members, members, place(batch, sharding))


def _in_order(found: list[tuple[Placed, T]]) -> T:
    """Trees of arrays, one entry for each member of a group, as one tree in the members' order."""
    order = np.argsort([number for placed, _ in found for number in placed.numbers])

    def of(*arrays: jax.Array) -> jax.Array:
        own = [
            array[: len(placed.numbers)] for array, (placed, _) in zip(arrays, found, strict=True)
        ]
        return own[0] if len(own) == 1 else jnp.concatenate(own)[order]

    joined: T = jax.tree.map(of, *(tree for _, tree in found))
    return joined


def _member(metrics: StepMetrics, index: int) -> StepMetrics:
    own: StepMetrics = jax.tree.map(lambda value: value[index], metrics)
    return own
