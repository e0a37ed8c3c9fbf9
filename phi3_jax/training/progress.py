"""A run in progress and its training loop: what a single run and a sweep share.

Each step is dispatched before the metrics of the previous one are read, and its batch is built
while the previous one runs, so the device never waits for the host.
"""

from __future__ import annotations

import abc
import dataclasses
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from phi3_jax.advice.clock import StepClock
from phi3_jax.config.training import TrainingConfig
from phi3_jax.data.batches import Batch, BatchPlan
from phi3_jax.data.masks import Example
from phi3_jax.evaluation.held_out import held_out_metrics
from phi3_jax.evaluation.loss import LossSums
from phi3_jax.sharding.processes import agree_to_stop
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.interrupt import Interrupted
from phi3_jax.training.metrics import MetricsWriter, StepFlops, Window, eval_record
from phi3_jax.training.profiling import Profile
from phi3_jax.training.record import Record
from phi3_jax.training.step import StepMetrics, TrainState
from phi3_jax.training.terminal import Terminal


class NonFiniteError(RuntimeError):
    """A loss or gradient was inf or nan, and the config says to stop, or no step was left."""


class Fetched(NamedTuple):
    """The batches of a step."""

    members: list[Batch]  # each member's `[A, B, S]`, on the host
    placed: Any  # the batch argument of the compiled step


class Flight(NamedTuple):
    """A dispatched step whose metrics have not been read yet."""

    step: int  # counted from 1
    members: list[Batch]
    metrics: StepMetrics


@dataclasses.dataclass(kw_only=True)
class InProgress(abc.ABC):
    """N adapters in training over one base: one in a run, several in a sweep.

    Attributes:
        config: the training section.
        plan: how examples become batches.
        held_out: held-out examples, if any.
        total_steps, steps_per_epoch: counts of optimizer steps.
        checkpoints, terminal: opened by the caller, as are the writers.
        writers: where each member's metrics go.
        evaluations: each member's held-out metrics, keyed by the step they were measured after.
        state: trainable arrays and optimizer state.
        step: steps taken.
        received: signals that arrived (see `collect_signals`).
        clock: measures how long the run will take.
        record: measures where the time goes.
        flops: how to count the arithmetic of a step; None leaves it out of the metrics.
        profile: the trace of some steps.
        windows: each member's sums since its last log line.
        fetched: the next step's batches, if they are already built.
    """

    config: TrainingConfig
    plan: BatchPlan
    held_out: Sequence[Example] | None
    total_steps: int
    steps_per_epoch: int
    checkpoints: Checkpoints
    terminal: Terminal
    writers: list[MetricsWriter]
    evaluations: list[dict[int, dict[str, float]]]
    state: TrainState
    step: int
    received: list[int]
    clock: StepClock
    record: Record = dataclasses.field(default_factory=Record)
    flops: StepFlops | None = None
    profile: Profile = dataclasses.field(default_factory=Profile)
    _polls: int = dataclasses.field(init=False, default=0)
    windows: list[Window] = dataclasses.field(init=False)
    fetched: Fetched | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.windows = [Window(self.flops) for _ in self.writers]

    @abc.abstractmethod
    def fetch(self) -> Fetched:
        """Build the next step's batches."""

    @abc.abstractmethod
    def take_step(self, placed: Any) -> tuple[TrainState, StepMetrics]:
        """Dispatch the compiled step."""

    @abc.abstractmethod
    def read(self, flight: Flight) -> None:
        """Read a step's metrics, waiting for it to finish, and report them."""

    @abc.abstractmethod
    def loss_sums(self, batch: Batch) -> LossSums:
        """The held-out loss sums of one batch `[B, S]`."""

    @abc.abstractmethod
    def log_evaluation(self, records: list[dict[str, float]]) -> None:
        """Print an evaluation, from each member's record."""

    @abc.abstractmethod
    def save(self) -> None:
        """Write a checkpoint."""

    def push(self) -> None:
        """Push what was just saved to the hub, which only a single run does."""
        return

    def start_step(self) -> Flight:
        """Dispatch one step and build the next batch while it runs."""
        fetched = self.fetched or self.fetch()
        self.clock.dispatch(tuple(batch["tokens"].shape for batch in fetched.members))
        with self.profile.step(self.step + 1, self.state):
            self.state, metrics = self.take_step(fetched.placed)
        self.step += 1
        if (trace := self.profile.end(self.step, self.state)) is not None:
            self.terminal.print(f"trace of steps until {self.step}: {trace}")
        self.fetched = self.fetch() if self.step < self.total_steps else None
        return Flight(self.step, fetched.members, metrics)

    def finish(self, flight: Flight) -> None:
        """Wait for a step and report it and, once, how long the others will take."""
        self.read(flight)
        positions = sum(batch["tokens"].size for batch in flight.members)
        if line := self.clock.read(positions, self.total_steps - flight.step):
            self.terminal.print(line)

    def evaluate(self) -> None:
        """Measure held-out metrics of every member; a no-op without held-out data.

        Raises:
            Interrupted: a signal arrived; a checkpoint is saved.
        """
        if self.held_out is None:
            return
        with self.record.during("evaluation"):
            batches = self._until_told(self.plan.eval_batches(self.held_out))
            found = held_out_metrics(self.loss_sums, batches)
        records = [eval_record(metrics) for metrics in found]
        for known, writer, record in zip(self.evaluations, self.writers, records, strict=True):
            known[self.step] = record
            writer.write(self.step, record)
        self.log_evaluation(records)

    def _until_told(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, unless a signal arrives: an evaluation may take longer than a preemption."""
        for batch in batches:
            if self.told_to_stop():
                self.stop()
            yield batch

    def told_to_stop(self) -> bool:
        """Whether to stop here; the answer is the same on all processes."""
        self._polls += 1
        return agree_to_stop(self.received, self._polls)

    def stop(self) -> NoReturn:
        """Save what there is to save and raise Interrupted."""
        if self.step:
            self.save()
        raise Interrupted(self.received[0] if self.received else signal.SIGTERM, self.step)

    def is_evaluated(self) -> bool:
        """Whether the held-out metrics of this step are known."""
        return all(self.step in known for known in self.evaluations)

    def is_logged(self, step: int) -> bool:
        """Whether a step's metrics are written: the first, the last, and every `logging_steps`."""
        return step % self.config.logging_steps == 0 or step in (1, self.total_steps)

    def is_due(self, every: int | None) -> bool:
        """Whether an action taken every `every` steps is due; None is never."""
        return every is not None and self.step % every == 0

    def start_clock(self) -> None:
        """Exclude the time since the last step from the speed."""
        self.clock.pause()
        for window in self.windows:
            window.start()


def take_steps(run: InProgress) -> None:
    """Take the remaining steps, evaluating and saving as configured.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; a checkpoint is saved.
    """
    flight = None
    if run.step and run.is_due(run.config.eval_steps) and not run.is_evaluated():
        # A signal arrived during the evaluation of this step, and the step was saved without it.
        run.evaluate()
        run.save()
    run.record.enter("steps")
    run.start_clock()
    while run.step < run.total_steps:
        started = run.start_step()
        if flight is not None:
            run.finish(flight)
        flight = started
        stop = run.told_to_stop()
        evaluate = run.is_due(run.config.eval_steps) or run.step == run.total_steps
        save = run.is_due(run.config.save_steps)
        if not (evaluate or save or stop):
            continue
        run.finish(flight)
        flight = None
        if stop:
            run.stop()
        # Evaluate before saving: a checkpoint carries the held-out loss of its step.
        if evaluate:
            run.evaluate()
        if save:
            run.save()
            run.push()
        run.start_clock()
    run.record.enter("end")
