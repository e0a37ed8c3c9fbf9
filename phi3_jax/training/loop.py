"""The training run: set up, evaluate, train, checkpoint, export."""

from __future__ import annotations

import dataclasses
import math
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_flax
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import Batch, BatchPlan
from phi3_jax.evaluation.held_out import held_out_metrics, jit_eval_step
from phi3_jax.generation import answers as samples
from phi3_jax.sharding.mesh import batch_sharding, place, row_devices
from phi3_jax.sharding.processes import agree_to_stop, is_first, on_first
from phi3_jax.sharding.rules import optimizer_shardings, state_shardings
from phi3_jax.training.checkpoints import Checkpoints, run_identity
from phi3_jax.training.interrupt import Interrupted, collect_signals
from phi3_jax.training.metrics import MetricsWriter, NoMetrics, Terminal, Window, eval_record
from phi3_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    total_steps,
    updates_made,
)
from phi3_jax.training.output import check_output, export_adapter
from phi3_jax.training.setup import Setup, attach, loss_settings, set_up
from phi3_jax.training.step import (
    StepMetrics,
    TrainState,
    jit_train_step,
    partition,
)

# Number of steps whose batches `init_lora_weights: eva` and `qera` use.
LOOKED_AT = 8


class Flight(NamedTuple):
    """A dispatched step whose metrics have not been read yet."""

    step: int  # counted from 1
    batch: Batch  # on the host
    metrics: StepMetrics


class NonFiniteError(RuntimeError):
    """A loss or gradient was inf or nan, and the config says to stop."""


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


def train(config: RunConfig, resume: bool = False) -> Result:
    """Fine-tune as configured and export a PEFT adapter.

    Args:
        config: the run's config.
        resume: continue from the last checkpoint in `training.output_dir`; the result is
            byte-identical to that of an uninterrupted run.

    Raises:
        UserError, lora_flax.LoraError: bad input.
        NonFiniteError: a loss or gradient was not finite, with `on_nonfinite: stop`.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    output = Path(config.training.output_dir).expanduser()
    check_output(output, resume)
    setup = set_up(config)
    with jax.set_mesh(setup.mesh):
        run = Run(setup, output, resume)
        try:
            if is_first():
                lora_flax.write_atomically(output / "config.yaml", setup.config.to_yaml())
            return run.train()
        finally:
            run.close()


class Run:
    """A run in progress: the training state plus metrics, checkpoints and evaluation.

    Args:
        setup: the loaded run.
        output: the run's output folder.
        resume: start from the last checkpoint in `output`.
    """

    def __init__(self, setup: Setup, output: Path, resume: bool):
        self.setup, self.output = setup, output
        self.config = config = setup.config.training
        self.row_devices = row_devices(setup.mesh)
        self.plan = BatchPlan.from_config(setup.config.data, config, self.row_devices)
        self.batches = self.plan.train_batches(setup.train.examples, config.seed)
        self.total_steps = total_steps(config, self.batches.steps_per_epoch)
        first = range(min(LOOKED_AT, self.total_steps))
        self.table = attach(setup, [self.batches[step] for step in first])
        tx = make_optimizer(config, self.total_steps)
        self.learning_rate = learning_rate_schedule(config, self.total_steps)
        self.graphdef, trainable, frozen = partition(setup.model)
        mesh = setup.mesh
        shardings = TrainState(
            state_shardings(trainable, mesh), optimizer_shardings(tx, trainable, mesh)
        )
        # Copies: a step donates these arrays, and PiSSA's frozen start shares A's initial array.
        trainable = place(jax.tree.map(jnp.copy, trainable), shardings.trainable)
        self.frozen = place(frozen, state_shardings(frozen, mesh))
        init = jax.jit(tx.init, out_shardings=shardings.opt_state)
        self.state = TrainState(trainable, init(trainable))
        self.train_step = jit_train_step(
            self.graphdef,
            tx,
            config.remat,
            loss_settings(config, self.row_devices),
            shardings,
        )
        self.eval_step = jit_eval_step(self.graphdef)
        identity = run_identity(setup.config, setup.checkpoint.fingerprint, setup.data)
        self.checkpoints = Checkpoints(output / "checkpoints", config.save_total_limit, identity)
        self.step = self.checkpoints.latest() or 0 if resume else 0
        if self.step:
            self.state = self.checkpoints.restore(self.step, self.state)
        self.writer: MetricsWriter = NoMetrics()
        on_first(lambda: self._open_writer(resume))
        self.terminal = Terminal(self.total_steps, self.step, quiet=not is_first())
        known = on_first(lambda: list(self.writer.evaluations().items()))
        self.evaluations: dict[int, dict[str, float]] = dict(known)
        self.skipped = self.step - updates_made(self.state.opt_state)
        self.stops = samples.stop_ids(setup.checkpoint.directory, setup.tokenizer)
        self.window = Window()
        self._fetched: tuple[Batch, Batch] | None = None

    def _open_writer(self, resume: bool) -> None:
        resumed_at = self.step if resume else None
        self.writer = MetricsWriter(self.setup.config, self.output, resumed_at)

    def train(self) -> Result:
        """Run the remaining steps and export the adapter."""
        self._introduce()
        if not self.step:
            self._evaluate()
            self._answer_samples("before")
        flight = None
        self.window.start()
        with collect_signals() as received:
            while self.step < self.total_steps:
                started = self._start_step()
                self._look_at(flight)
                flight = started
                stop = agree_to_stop(received, self.step)
                evaluate = self._due(self.config.eval_steps) or self.step == self.total_steps
                save = self._due(self.config.save_steps) or stop
                if not (evaluate or save):
                    continue
                self._look_at(flight)
                flight = None
                # Evaluate before saving: a checkpoint carries the held-out loss of its step.
                if evaluate:
                    self._evaluate()
                if save:
                    self._save()
                if stop:
                    raise Interrupted(received[0] if received else signal.SIGTERM, self.step)
                self.window.start()
        if self.step not in self.evaluations:
            self._evaluate()
        self._save()
        self._answer_samples("after")
        return Result(self._export(), self.total_steps, self.skipped, self.evaluations)

    def close(self) -> None:
        """Close all files and the terminal."""
        self.terminal.close()
        self.writer.close()
        self.checkpoints.close()

    def _fetch(self) -> tuple[Batch, Batch]:
        """The next step's batch, on the host and on the devices."""
        batch = self.batches[self.step]
        return batch, place(batch, batch_sharding(self.setup.mesh, leading=1))

    def _start_step(self) -> Flight:
        """Dispatch one step and prepare the next batch while it runs."""
        batch, placed = self._fetched or self._fetch()
        step, seed = np.int32(self.step), np.uint32(self.config.seed)
        self.state, metrics = self.train_step(self.state, self.frozen, placed, step, seed)
        self.step += 1
        self._fetched = self._fetch() if self.step < self.total_steps else None
        return Flight(self.step, batch, metrics)

    def _look_at(self, flight: Flight | None) -> None:
        """Read a step's metrics while the next step is already running, so the device never waits.

        Raises:
            NonFiniteError: a non-finite step, if the config says to stop. The state stays finite.
        """
        if flight is None:
            return
        metrics = jax.device_get(flight.metrics)
        self.window.add(metrics, flight.batch)
        if not metrics.finite:
            self._not_finite(flight.step, metrics)
        self._report(flight.step, metrics)

    def _not_finite(self, step: int, metrics: StepMetrics) -> None:
        seen = (
            f"step {step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}, "
            f"{int(metrics.target_tokens)} target tokens"
        )
        if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm):
            seen += ", and the update is not finite"
        if self.config.on_nonfinite == "stop":
            last = self.checkpoints.latest()
            kept = "" if last is None else f"; the checkpoint of step {last} is sound"
            raise NonFiniteError(
                f"{seen}. The step was not taken{kept}. Lower training.learning_rate, use "
                "model.dtype bfloat16 or float32, look at the data; or set "
                "training.on_nonfinite: skip"
            )
        self.skipped += 1
        self.terminal.print(f"{seen}; skipped ({self.skipped} so far)")

    def _report(self, step: int, metrics: StepMetrics) -> None:
        rate = float(self.learning_rate(max(step - self.skipped - 1, 0)))
        now = {
            "loss": float(metrics.loss),
            "learning_rate": rate,
            "tokens_per_second": self.window.tokens_per_second,
        }
        self.terminal.step(step, now)
        if step % self.config.logging_steps and step not in (1, self.total_steps):
            return
        record = self.window.take() | {
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": rate,
            "epoch": step / self.batches.steps_per_epoch,
        }
        if self.skipped:
            record["skipped_steps"] = self.skipped
        self.writer.write(step, record)
        self.terminal.log(step, record)

    def _evaluate(self) -> None:
        """Measure held-out loss, perplexity and token accuracy; a no-op without held-out data."""
        if self.setup.test is None:
            return
        sharding = batch_sharding(self.setup.mesh)
        (found,) = held_out_metrics(
            lambda batch: self.eval_step(self.state.trainable, self.frozen, place(batch, sharding)),
            self.plan.eval_batches(self.setup.test.examples),
        )
        record = eval_record(found)
        self.evaluations[self.step] = record
        self.writer.write(self.step, record)
        self.terminal.log(self.step, record)

    def _save(self) -> None:
        loss = self.evaluations.get(self.step, {}).get("eval_loss", math.nan)
        self.checkpoints.save(self.step, self.state, loss if math.isfinite(loss) else None)

    def _answer_samples(self, when: str) -> None:
        """Answer the sample prompts and save the answers next to earlier ones."""
        prompts = self.config.sample_prompts
        file = self.output / "samples.jsonl"
        known = {record["prompt"]: record for record in samples.read_samples(file)}
        if when == "before":
            known = {}
        model = nnx.merge(self.graphdef, self.state.trainable, self.frozen)
        answers = samples.answer(
            model, self.setup.tokenizer, prompts, self.stops, self.config.sample_max_new_tokens
        )
        records = []
        for prompt, text in zip(prompts, answers, strict=True):
            records.append(known.get(prompt, {"prompt": prompt}) | {when: text})
            self.terminal.print(f"{when}  user: {prompt}\n{' ' * len(when)}  assistant: {text}")
        if records and is_first():
            samples.write_samples(file, records)

    def _export(self) -> Path:
        """Write the PEFT adapter with its card and tokenizer."""
        step = self.step
        if self.config.load_best_model_at_end and (best := self.checkpoints.best()) is not None:
            step = best
            self.state = self.checkpoints.restore(best, self.state)
            self.terminal.print(f"exporting the checkpoint of step {best}, the best one")
        adapter = self.output / "adapter"
        nnx.update(self.setup.model, jax.tree.map(lora_flax.on_host, self.state.trainable))
        results = {
            f"after {taken} steps": values
            for taken, values in sorted(self.evaluations.items())
            if taken in (0, step)
        }
        export_adapter(self.setup, self.setup.config, adapter, results)
        self.terminal.print(f"adapter: {adapter}")
        return adapter

    def _introduce(self) -> None:
        say = self.terminal.print
        say(self.setup.describe())
        say(lora_flax.format_table(self.table))
        from_step = f", going on from step {self.step}" if self.step else ""
        say(f"{self.total_steps} steps, {self.batches.steps_per_epoch} an epoch{from_step}")

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0
