"""A run in progress and its training loop: what a single run and a sweep share.

Each step is dispatched before the metrics of the previous one are read, and its batch is built
while the previous one runs, so the device never waits for the host.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
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
from phi3_jax.sharding.rules import State
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.interrupt import Interrupted
from phi3_jax.training.metrics import MetricsWriter, StepFlops, Window, eval_record
from phi3_jax.training.profiling import Profile
from phi3_jax.training.record import Record
from phi3_jax.training.schedule_free import averaged
from phi3_jax.training.step import StepMetrics, TrainState
from phi3_jax.training.strategies import Best, EarlyStopping, Strategies, is_due
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
        when: the steps at which something is due.
        total_steps: number of optimizer steps.
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
    when: Strategies
    total_steps: int
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
        """Read a step's metrics, waiting for it to finish, and show them."""

    @abc.abstractmethod
    def log(self, flight: Flight) -> None:
        """Write the metrics of the step that was read last."""

    @abc.abstractmethod
    def loss_sums(self, weights: State, batch: Batch) -> LossSums:
        """The held-out loss sums of one batch `[B, S]` with these weights (see `weights`)."""

    @abc.abstractmethod
    def log_evaluation(self, records: list[dict[str, float]]) -> None:
        """Print an evaluation, from each member's record."""

    @abc.abstractmethod
    def save(self) -> None:
        """Write a checkpoint."""

    def push(self) -> None:
        """Push what was just saved to the hub, which only a single run does."""
        return

    def weights(self) -> State:
        """The trainable arrays as they are evaluated and exported."""
        return averaged(self.config, self.state.opt_state, self.state.trainable)

    def active(self) -> Sequence[int]:
        """The members that are still in training."""
        return range(len(self.evaluations))

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
        if self.is_logged(flight.step):
            self.log(flight)
        positions = sum(batch["tokens"].size for batch in flight.members)
        if line := self.clock.read(positions, self.total_steps - flight.step):
            self.terminal.print(line)

    def evaluate(self) -> None:
        """Measure held-out metrics of the active members; a no-op without held-out data.

        Raises:
            Interrupted: a signal arrived; a checkpoint is saved.
        """
        if self.held_out is None:
            return
        with self.record.during("evaluation"):
            batches = self._until_told(self.plan.eval_batches(self.held_out))
            found = held_out_metrics(functools.partial(self.loss_sums, self.weights()), batches)
            more = self.answer_metrics()
        records = [eval_record(metrics) | more for metrics in found]
        for index, record in zip(self.active(), records, strict=True):
            self.evaluations[index][self.step] = record
            self.writers[index].write(self.step, record)
        self.log_evaluation(records)

    def answer_metrics(self) -> dict[str, float]:
        """Metrics of generated answers, if the run generates any."""
        return {}

    def _until_told(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.poll()
            yield batch

    def poll(self) -> None:
        """Stop if a signal arrived: an evaluation may take longer than a preemption."""
        if self.told_to_stop():
            self.stop()

    def told_to_stop(self) -> bool:
        """Whether to stop here; the answer is the same on all processes."""
        self._polls += 1
        return agree_to_stop(self.received, self._polls)

    def stop(self) -> NoReturn:
        """Save what there is to save and raise Interrupted."""
        if self.step:
            self.save()
            self.checkpoints.wait()
        raise Interrupted(self.received[0] if self.received else signal.SIGTERM, self.step)

    def end(self) -> None:
        """Evaluate and save the last step, and wait until its checkpoint is complete."""
        if not self.is_evaluated():
            self.evaluate()
        self.save()
        self.checkpoints.wait()

    def is_evaluated(self) -> bool:
        """Whether the held-out metrics of this step are known."""
        return all(self.step in self.evaluations[index] for index in self.active())

    def is_evaluation_due(self) -> bool:
        """Whether held-out metrics are measured after this step, if it is not the last."""
        return is_due(self.when.evaluate, self.step)

    def is_logged(self, step: int) -> bool:
        """Whether a step's metrics are written when it is read, as those of the first and last are.

        Whether a step is the last because the run stops early is known only after its evaluation.
        """
        return is_due(self.when.log, step) or step in (1, self.total_steps)

    def is_regular(self) -> bool:
        """Whether this step is saved whatever happens, and so may be the best one."""
        return self.is_save_due() or self.step == self.total_steps or self.stops_early()

    def is_save_due(self) -> bool:
        """Whether this step is saved, and pushed, also in a longer run."""
        best = self.when.save_best and is_due(self.when.evaluate, self.step) and self.is_best()
        return best or is_due(self.when.save, self.step)

    def is_best(self) -> bool:
        """Whether the evaluation of this step is the best one since the start of training."""
        known = {
            step: record
            for step, record in self.evaluations[0].items()
            if step == self.step or is_due(self.when.evaluate, step)
        }
        return Best.of(self.config).choose(known) == self.step

    def stops_early(self) -> bool:
        """Whether the evaluations so far end the run at this step."""
        stopping, every = EarlyStopping.of(self.config), self.when.evaluate
        if stopping is None or not is_due(every, self.step) or not self.is_evaluated():
            return False
        known = {s: record for s, record in self.evaluations[0].items() if s <= self.step}
        return stopping.stops(known, every)

    def start_clock(self) -> None:
        """Exclude the time since the last step from the speed."""
        self.clock.pause()
        for window in self.windows:
            window.start()


def take_steps(run: InProgress) -> None:
    """Take the remaining steps, evaluating and saving as configured, or fewer if that stops early.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; a checkpoint is saved.
    """
    flight = read = None
    if run.step and run.is_evaluation_due() and not run.is_evaluated():
        # A signal arrived during the evaluation of this step, and the step was saved without it.
        run.evaluate()
        run.save()
    if run.is_save_due():  # A signal may have ended the run before the push.
        run.push()
    run.record.enter("steps")
    run.start_clock()
    while run.step < run.total_steps and not run.stops_early():
        started = run.start_step()
        if flight is not None:
            run.finish(flight)
        flight = started
        stop = run.told_to_stop()
        evaluate = run.is_evaluation_due() or run.step == run.total_steps
        if not (evaluate or stop or is_due(run.when.save, run.step)):
            continue
        run.finish(flight)
        read, flight = flight, None
        if stop:
            run.stop()
        # Evaluate before saving: a checkpoint carries the metrics of its step.
        if evaluate:
            run.evaluate()
        if run.is_save_due():
            if run.step < run.total_steps:  # the last one is written when the run ends
                run.record.report(run.step)
            run.save()
            run.push()
        run.start_clock()
    run.record.enter("end")
    if run.step < run.total_steps:
        if read is not None and not run.is_logged(run.step):
            run.log(read)
        run.terminal.print(
            f"stopped early at step {run.step}: {run.config.best_metric} has not improved for "
            f"training.early_stopping_patience={run.config.early_stopping_patience} evaluations"
        )
