"""A training run, from its config to the exported adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import lora_flax
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import Batch, Batches, BatchPlan
from phi3_jax.data.stream_batches import StreamBatches
from phi3_jax.evaluation.answer_quality import Quiz, rouge_scorer
from phi3_jax.evaluation.held_out import jit_eval_step
from phi3_jax.evaluation.loss import LossSums
from phi3_jax.model.network import Phi3
from phi3_jax.sharding.mesh import batch_sharding, place, row_devices, token_devices
from phi3_jax.sharding.processes import is_first
from phi3_jax.sharding.rules import State, state_shardings
from phi3_jax.training.checkpoints import Checkpoints, saved_choices
from phi3_jax.training.facts import run_facts
from phi3_jax.training.hub import Pushes
from phi3_jax.training.interrupt import collect_signals, end_at_once
from phi3_jax.training.lora_matmul import choose_lora_matmul
from phi3_jax.training.metrics import StepFlops, open_metrics, read_evaluations, step_record
from phi3_jax.training.optimizer import (
    make_optimizer,
    planned_steps,
    total_steps,
    updates_made,
)
from phi3_jax.training.output import Resume, open_output
from phi3_jax.training.profiling import Profile
from phi3_jax.training.progress import Fetched, Flight, InProgress, NonFiniteError, take_steps
from phi3_jax.training.record import open_record
from phi3_jax.training.remat import choose_remat
from phi3_jax.training.results import export, quiz_of, take_best, write_adapter
from phi3_jax.training.samples import Samples
from phi3_jax.training.schedules import learning_rate_schedule
from phi3_jax.training.setup import Setup, attach, identity_of, loss_settings, set_up
from phi3_jax.training.step import (
    StepMetrics,
    TrainState,
    jit_train_step,
    partition,
    start_state,
    train_state_shardings,
)
from phi3_jax.training.strategies import Best, Strategies
from phi3_jax.training.stream import advise, batches_of, find_position, position_of_all
from phi3_jax.training.terminal import Terminal
from phi3_jax.training.trackers import check_trackers

# Number of steps whose batches `init_lora_weights: eva` and `qera` use.
INIT_STEPS = 8


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a finished run.

    Attributes:
        adapter: folder of the PEFT adapter.
        steps: number of optimizer steps.
        skipped: steps with a non-finite loss or gradient (`on_nonfinite: skip`).
        evaluations: held-out metrics, keyed by the step they were measured after.
    """

    adapter: Path
    steps: int
    skipped: int
    evaluations: dict[int, dict[str, float]]


def train(config: RunConfig, resume: Resume = False, command: str | None = None) -> Result:
    """Fine-tune as configured and export a PEFT adapter.

    Args:
        config: the run's config.
        resume: continue from the last checkpoint in `training.output_dir`; the result is
            byte-identical to that of an uninterrupted run. "auto" starts a new run where there is
            none, and takes an earlier checkpoint where the last one is damaged.
        command: the command line, for the report.

    Raises:
        UserError, lora_flax.LoraError: bad input.
        NonFiniteError: a loss or gradient was not finite, with `on_nonfinite: stop`, or in every
            step.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    with contextlib.ExitStack() as stack:
        # --- Configuration and folder ------------------------------------------------------------
        check_trackers(config.training.report_to)
        if config.training.eval_generate:
            rouge_scorer()
        opened = stack.enter_context(open_output(config.training.output_dir, resume))
        output = opened.path
        record = stack.enter_context(open_record(output, command))

        # --- Data and model ----------------------------------------------------------------------
        record.enter("data and model")
        chosen = saved_choices(opened.checkpoints) if opened.resume else {}
        setup = set_up(config, chosen)
        config, training, mesh = setup.config, setup.config.training, setup.mesh
        stack.enter_context(jax.set_mesh(mesh))
        plan = BatchPlan.from_config(config.data, training, row_devices(mesh))
        batches = stack.enter_context(batches_of(setup, plan))
        steps = total_steps(training, batches.steps_per_epoch)
        planned = planned_steps(training, batches.steps_per_epoch)

        # --- Adapter -----------------------------------------------------------------------------
        record.enter("adapter")
        table = attach(setup, (batches[step] for step in range(min(INIT_STEPS, planned))))
        choose_lora_matmul(setup, chosen.get("lora_matmul"))

        # --- Mesh placement and step -------------------------------------------------------------
        graphdef, trainable, frozen = partition(setup.model)
        tx = make_optimizer(training, steps, setup.model)
        shardings = train_state_shardings(tx, trainable, mesh)
        state = start_state(tx, trainable, shardings)
        frozen = place(frozen, state_shardings(frozen, mesh))
        loss = loss_settings(training, token_devices(mesh))
        remat = choose_remat(setup, chosen.get("remat"))
        train_step = jit_train_step(graphdef, tx, remat, loss, shardings)

        # --- Resume ------------------------------------------------------------------------------
        identity = identity_of(setup, row_devices(mesh), planned)
        checkpoints = Checkpoints(
            opened.checkpoints, identity, training.save_total_limit, opened, Best.of(training)
        )
        stack.enter_context(checkpoints)
        # Rebinding `state` frees the arrays that a resumed run replaces.
        first_step, state = checkpoints.start(state, opened.resume, opened.fall_back)
        find_position(batches, checkpoints, first_step)

        # --- Log ---------------------------------------------------------------------------------
        profile = Profile.of_run(training.profile_steps, output, first_step, steps)
        record.begin(first_step, steps, run_facts(setup, table))
        terminal = stack.enter_context(Terminal(steps, first_step, not is_first(), record.warn))
        writer = stack.enter_context(open_metrics(config, output, first_step, terminal.print))
        if is_first():
            lora_flax.write_atomically(output / "config.yaml", config.to_yaml())
        terminal.print(setup.describe())
        terminal.print(lora_flax.format_table(table))
        from_step = f", resuming from step {first_step}" if first_step else ""
        terminal.print(f"{steps} steps ({batches.pace}){from_step}")
        advice, clock = advise(setup, table, plan, batches)
        terminal.print(advice)

        # --- Training loop -----------------------------------------------------------------------
        run = Run(
            config=training,
            plan=plan,
            held_out=None if setup.test is None else setup.test.examples,
            when=Strategies.of(training, planned, batches.steps_per_epoch),
            total_steps=steps,
            checkpoints=checkpoints,
            terminal=terminal,
            writers=[writer],
            evaluations=[read_evaluations(output)],
            state=state,
            step=first_step,
            received=stack.enter_context(collect_signals()),
            clock=clock,
            record=record,
            flops=StepFlops.on(setup.checkpoint.config, list(mesh.devices.flat)),
            profile=stack.enter_context(contextlib.closing(profile)),
            mesh=mesh,
            batches=batches,
            learning_rate=learning_rate_schedule(training, steps),
            graphdef=graphdef,
            train_step=train_step,
            eval_step=jit_eval_step(graphdef),
            frozen=frozen,
            skipped=first_step - updates_made(state.opt_state),
            setup=setup,
            pushes=Pushes(training, output, terminal.print),
            quiz=quiz_of(setup, plan.eval_rows),
        )
        samples = Samples(training, setup.checkpoint.directory, setup.tokenizer, output)
        if not run.step:
            run.evaluate()
            run.answer(samples, "before")
        take_steps(run)

        # --- Evaluation --------------------------------------------------------------------------
        run.end()
        end_at_once()
        run.require_an_update()

        # --- Export ------------------------------------------------------------------------------
        record.enter("export")
        exported = take_best(run, opened.fall_back)
        run.answer(samples, "after")
        adapter = export(run, setup, run.pushes, output / "adapter", exported)
        terminal.print(record.summary())
        terminal.print(record.end())
        return Result(adapter, run.step, run.skipped, run.evaluations[0])


@dataclasses.dataclass(kw_only=True)
class Run(InProgress):
    """A single run in progress.

    Attributes:
        mesh: the device mesh.
        batches: the batch of each step.
        learning_rate: the learning rate at a step.
        graphdef: the model's graph definition.
        train_step, eval_step: the compiled steps (`jit_train_step`, `jit_eval_step`).
        frozen: the arrays that do not train, placed on the mesh.
        skipped: steps with a non-finite loss or gradient so far.
        setup: the loaded run.
        pushes: pushes to the hub.
        quiz: the questions of `eval_generate`.
    """

    mesh: Mesh
    batches: Batches | StreamBatches
    learning_rate: optax.Schedule
    graphdef: nnx.GraphDef[Phi3]
    train_step: Callable[..., tuple[TrainState, StepMetrics]]
    eval_step: Callable[..., LossSums]
    frozen: nnx.State[Any, Any]
    skipped: int
    setup: Setup
    pushes: Pushes
    quiz: Quiz | None

    def fetch(self) -> Fetched:
        """Build the next step's batch and place it on the mesh."""
        batch = self.batches[self.step]
        return Fetched([batch], place(batch, batch_sharding(self.mesh, leading=1)))

    def take_step(self, placed: Batch) -> tuple[TrainState, StepMetrics]:
        """Dispatch the compiled step."""
        step, seed = np.int32(self.step), np.uint32(self.config.seed)
        return self.train_step(self.state, self.frozen, placed, step, seed)

    def read(self, flight: Flight) -> None:
        """Read a step's metrics, waiting for it to finish, and report them.

        Raises:
            NonFiniteError: a non-finite step, if the config says to stop. The state stays finite.
        """
        metrics, window = jax.device_get(flight.metrics), self.windows[0]
        window.add(metrics, flight.members[0])
        if not metrics.finite:
            self._not_finite(flight.step, metrics)
        shown = {"loss": float(metrics.loss), "learning_rate": self._rate(flight.step)}
        self.terminal.step(flight.step, shown | {"tokens_per_second": window.tokens_per_second})

    def log(self, flight: Flight) -> None:
        """Write the record of the steps since the last one."""
        metrics, rate = jax.device_get(flight.metrics), self._rate(flight.step)
        epoch = self.batches.epoch(flight.step)
        record = self.windows[0].take() | step_record(metrics, rate, epoch)
        record |= self.batches.counts(flight.step - 1)
        if self.skipped:
            record["skipped_steps"] = self.skipped
        self.writers[0].write(flight.step, record)
        self.terminal.log(flight.step, record)

    def _rate(self, step: int) -> float:
        """The learning rate of the step that was read last."""
        return float(self.learning_rate(max(step - self.skipped - 1, 0)))

    def _not_finite(self, step: int, metrics: StepMetrics) -> None:
        seen = (
            f"step {step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}, "
            f"{int(metrics.target_tokens)} target tokens"
        )
        if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm):
            seen += ", but the update is not finite"
        if self.config.on_nonfinite == "stop":
            last = self.checkpoints.latest()
            kept = "" if last is None else f"; the checkpoint of step {last} is intact"
            raise NonFiniteError(
                f"{seen}. The step was skipped{kept}. Lower training.learning_rate, use "
                "model.dtype bfloat16 or float32, check the data, or set "
                "training.on_nonfinite: skip"
            )
        self.skipped += 1
        self.terminal.print(f"{seen}; skipped ({self.skipped} so far)")

    def require_an_update(self) -> None:
        """Raise NonFiniteError if every step was skipped: the adapter is the one of the start."""
        if self.skipped == self.step > 0:
            raise NonFiniteError(
                f"every one of the {self.step} steps had a loss or gradient that is not finite and "
                "was skipped: nothing was trained, and no adapter is written. Lower "
                "training.learning_rate, use model.dtype bfloat16 or float32, or check the data"
            )

    def loss_sums(self, weights: State, batch: Batch) -> LossSums:
        """The held-out loss sums of one batch `[B, S]`, scalars."""
        return self.eval_step(weights, self.frozen, place(batch, batch_sharding(self.mesh)))

    def answer_metrics(self) -> dict[str, float]:
        """The metrics of `eval_generate`."""
        return {} if self.quiz is None else self.quiz.grade(self.model(), self.poll)

    def log_evaluation(self, records: list[dict[str, float]]) -> None:
        """Print the whole record."""
        self.terminal.log(self.step, records[0])

    def save(self) -> None:
        """Write a checkpoint with the held-out metrics of its step.

        One that only a signal caused carries none: without the signal it would not exist, and so it
        may not become the best one.
        """
        metrics = self.evaluations[0].get(self.step, {}) if self.is_regular() else {}
        with self.record.during("saving"):
            self.record.write(self.step)
            position = position_of_all(self.batches, self.step)
            self.checkpoints.save(self.step, self.state, metrics, position, self.is_save_due())

    def push(self) -> None:
        """Push the adapter of a checkpoint in the background; the last one is pushed at the end."""
        if self.pushes.takes_checkpoints and self.step < self.total_steps:
            step, state = self.step, self.state
            self.pushes.checkpoint(
                step, lambda folder: write_adapter(self, self.setup, folder, step, state)
            )

    def answer(self, samples: Samples, when: Literal["before", "after"]) -> None:
        """Answer the sample prompts with the current weights."""
        with self.record.during("samples"):
            samples.answer(when, self.model(), self.terminal)

    def model(self) -> Phi3:
        """The model with the current weights."""
        return nnx.merge(self.graphdef, self.weights(), self.frozen)
