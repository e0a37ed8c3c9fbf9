"""Train several adapters at once on one frozen base, compare them, and report the best.

Every combination of the lists in `sweep:` is a member. One compiled step runs all of them and reads
each base weight once. Each member has its own metrics and exports its own PEFT adapter, the same
one a separate run would produce.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import lora_flax
from phi3_jax.advice.start import clock_of
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import Batch, Batches, BatchPlan
from phi3_jax.errors import UserError
from phi3_jax.evaluation.loss import LossSums
from phi3_jax.sharding.mesh import place, row_devices
from phi3_jax.sharding.rules import State
from phi3_jax.training.checkpoints import Checkpoints, saved_choices
from phi3_jax.training.facts import run_facts
from phi3_jax.training.interrupt import collect_signals
from phi3_jax.training.members import Member, sweep_members
from phi3_jax.training.metrics import StepFlops, open_metrics, read_evaluations, step_record
from phi3_jax.training.optimizer import make_optimizer, planned_steps, total_steps, update_counts
from phi3_jax.training.output import Resume, export_adapter, open_output
from phi3_jax.training.profiling import Profile
from phi3_jax.training.progress import Fetched, Flight, InProgress, NonFiniteError, take_steps
from phi3_jax.training.record import open_record
from phi3_jax.training.remat import choose_remat
from phi3_jax.training.schedules import learning_rate_schedule
from phi3_jax.training.setup import Setup, identity_of, loss_settings, set_up
from phi3_jax.training.step import StepMetrics, TrainState, jit_sweep_eval_step, jit_sweep_step
from phi3_jax.training.strategies import Strategies
from phi3_jax.training.terminal import Terminal
from phi3_jax.training.trackers import check_trackers


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The result of a finished sweep.

    Attributes:
        adapters: folder of each member's PEFT adapter, keyed by name; a member whose steps were all
            skipped has none.
        losses: held-out loss of each of them after the last step, or its training loss if nothing
            is held out.
        best: name of the member with the lowest loss.
    """

    adapters: dict[str, Path]
    losses: dict[str, float]
    best: str


def train_sweep(
    config: RunConfig, resume: Resume = False, command: str | None = None
) -> SweepResult:
    """Train all members of the sweep and export their adapters.

    A member with a non-finite loss or gradient skips that step and continues, whatever
    `on_nonfinite` says, so that it does not stop the others.

    Args:
        config: a config with lists in `sweep`.
        resume, command: as for `train`.

    Raises:
        UserError, lora_flax.LoraError: bad input.
        NonFiniteError: every step of every member was skipped.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    if jax.process_count() > 1:
        raise UserError(f"a sweep needs a single process, but there are {jax.process_count()}")
    with contextlib.ExitStack() as stack:
        # --- Configuration and folder ------------------------------------------------------------
        check_trackers(config.training.report_to)
        opened = stack.enter_context(open_output(config.training.output_dir, resume))
        output = opened.path
        record = stack.enter_context(open_record(output, command))

        # --- Data and model ----------------------------------------------------------------------
        record.enter("data and model")
        chosen = saved_choices(opened.checkpoints) if opened.resume else {}
        setup = set_up(config, chosen)
        config, training = setup.config, setup.config.training
        members = sweep_members(config)
        seeds = [member.config.training.seed for member in members]
        plan = BatchPlan.from_config(config.data, training, row_devices(setup.mesh))
        batches = {seed: plan.train_batches(setup.train.examples, seed) for seed in seeds}
        steps_per_epoch = batches[seeds[0]].steps_per_epoch
        steps = total_steps(training, steps_per_epoch)

        # --- Adapters ----------------------------------------------------------------------------
        record.enter("adapters")
        many = lora_flax.wrap_many(
            setup.model,
            [setup.lora_of(member.config) for member in members],
            [nnx.Rngs(seed) for seed in seeds],
        )

        # --- Placement and step ------------------------------------------------------------------
        # Updates are computed with a learning rate of 1, then scaled by each member's rate.
        unit = training.model_copy(update={"learning_rate": 1.0})
        tx = make_optimizer(unit, steps, setup.model)
        # Placed the way a step returns it; otherwise the second step would recompile.
        state = TrainState(many.trainable, jax.vmap(tx.init)(many.trainable))
        state = place(state, NamedSharding(setup.mesh, PartitionSpec()))
        loss = loss_settings(training, row_devices(setup.mesh))
        remat = choose_remat(setup, chosen.get("remat"), len(members))
        train_step = jit_sweep_step(many.graphdef, tx, remat, len(batches) == 1, loss)

        # --- Resume ------------------------------------------------------------------------------
        planned = planned_steps(training, steps_per_epoch)
        identity = identity_of(setup, row_devices(setup.mesh), planned)
        checkpoints = Checkpoints(opened.checkpoints, identity, training.save_total_limit, opened)
        stack.enter_context(checkpoints)
        first_step, state = checkpoints.start(state, opened.resume, opened.fall_back)

        # --- Log ---------------------------------------------------------------------------------
        profile = Profile.of_run(training.profile_steps, output, first_step, steps)
        record.begin(first_step, steps, run_facts(setup, None))
        terminal = stack.enter_context(Terminal(steps, first_step, warned=record.warn))
        folders = [Path(member.config.training.output_dir).expanduser() for member in members]
        writers = []
        for member, folder in zip(members, folders, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            lora_flax.write_atomically(folder / "config.yaml", member.config.to_yaml())
            opening = open_metrics(member.config, folder, first_step, terminal.print)
            writers.append(stack.enter_context(opening))
        lora_flax.write_atomically(output / "config.yaml", config.to_yaml())
        terminal.print(setup.describe())
        names = "; ".join(member.name for member in members)
        terminal.print(f"training {len(members)} adapters at once: {names}")

        # --- Training loop -----------------------------------------------------------------------
        sweep = Sweep(
            config=training,
            plan=plan,
            held_out=None if setup.test is None else setup.test.examples,
            when=Strategies.of(training, planned, steps_per_epoch),
            total_steps=steps,
            steps_per_epoch=steps_per_epoch,
            checkpoints=checkpoints,
            terminal=terminal,
            writers=writers,
            evaluations=[read_evaluations(folder) for folder in folders],
            state=state,
            step=first_step,
            received=stack.enter_context(collect_signals()),
            clock=clock_of(batches[seed] for seed in seeds),
            record=record,
            flops=StepFlops.on(setup.checkpoint.config, list(setup.mesh.devices.flat)),
            profile=stack.enter_context(contextlib.closing(profile)),
            members=members,
            batches=batches,
            schedule=learning_rate_schedule(unit, steps),
            train_step=train_step,
            eval_step=jit_sweep_eval_step(many.graphdef),
            many=many,
            losses=[math.nan] * len(members),
        )
        if not sweep.step:
            sweep.evaluate()
        take_steps(sweep)

        # --- Evaluation --------------------------------------------------------------------------
        sweep.end()

        # --- Export ------------------------------------------------------------------------------
        record.enter("export")
        result = export(sweep, setup, output)
        terminal.print(record.summary())
        terminal.print(record.end())
        return result


@dataclasses.dataclass(kw_only=True)
class Sweep(InProgress):
    """A sweep in progress: like `loop.Run`, with a leading axis of N on the trainable arrays.

    Attributes:
        members: the N runs.
        batches: the batch of each step, keyed by seed.
        schedule: the learning rate at a step, with a peak of 1.
        train_step, eval_step: the compiled steps (`jit_sweep_step`, `jit_sweep_eval_step`).
        many: the N adapters before the first step, and the arrays that do not train.
        losses: training loss of each member in its last record.
        seeds, rates: each member's seed and learning rate, `[N]`.
    """

    members: list[Member]
    batches: dict[int, Batches]
    schedule: optax.Schedule
    train_step: Callable[..., tuple[TrainState, StepMetrics]]
    eval_step: Callable[..., LossSums]
    many: lora_flax.Many
    losses: list[float]
    seeds: jax.Array = dataclasses.field(init=False)
    rates: jax.Array = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        runs = [member.config.training for member in self.members]
        self.seeds = jnp.array([run.seed for run in runs], jnp.uint32)
        self.rates = jnp.array([run.learning_rate for run in runs], jnp.float32)

    def fetch(self) -> Fetched:
        """Build the next step's batches: one for all members if they share a seed."""
        of_seed = {seed: batches[self.step] for seed, batches in self.batches.items()}
        own = [of_seed[member.config.training.seed] for member in self.members]
        return Fetched(own, own[0] if len(of_seed) == 1 else _stacked(own))

    def take_step(self, placed: Batch) -> tuple[TrainState, StepMetrics]:
        """Dispatch the compiled step."""
        many, step = self.many, jnp.int32(self.step)
        return self.train_step(
            self.state, many.constants, many.frozen, placed, step, self.seeds, self.rates
        )

    def read(self, flight: Flight) -> None:
        """Read a step's metrics, waiting for it to finish, and report them."""
        metrics = jax.device_get(flight.metrics)
        own = [_member(metrics, index) for index in range(len(self.members))]
        for window, one, batch in zip(self.windows, own, flight.members, strict=True):
            window.add(one, batch)
        factor = float(self.schedule(flight.step - 1))
        speed = sum(window.tokens_per_second for window in self.windows)
        shown = {"loss": float(np.min(metrics.loss)), "learning_rate": factor}
        self.terminal.step(flight.step, shown | {"tokens_per_second": speed})
        if not self.is_logged(flight.step):
            return
        line = {"tokens_per_second": speed}
        epoch = flight.step / self.steps_per_epoch
        for index, member in enumerate(self.members):
            rate = factor * member.config.training.learning_rate
            record = self.windows[index].take() | step_record(own[index], rate, epoch)
            self.losses[index] = record.get("loss", math.nan)
            for name in ("tflops_per_second", "utilization"):
                if name in record:
                    line[name] = line.get(name, 0.0) + record[name]
            self.writers[index].write(flight.step, record)
        self.terminal.log(flight.step, line)
        names = (member.name for member in self.members)
        self.terminal.compare(flight.step, "loss", dict(zip(names, self.losses, strict=True)))

    def loss_sums(self, weights: State, batch: Batch) -> LossSums:
        """The held-out loss sums of one batch `[B, S]`, `[N]`."""
        return self.eval_step(weights, self.many.constants, self.many.frozen, batch)

    def log_evaluation(self, records: list[dict[str, float]]) -> None:
        """Print the held-out loss of each member."""
        pairs = zip(self.members, records, strict=True)
        losses = {member.name: record["eval_loss"] for member, record in pairs}
        self.terminal.compare(self.step, "eval_loss", losses)

    def save(self) -> None:
        """Write a checkpoint of all members, without held-out metrics: no step is best for all."""
        with self.record.during("saving"):
            self.record.write(self.step)
            self.checkpoints.save(self.step, self.state, {})


def export(sweep: Sweep, setup: Setup, output: Path) -> SweepResult:
    """Write every adapter and sweep.json with the comparison, and report the best.

    Raises:
        NonFiniteError: every step of every member was skipped.
    """
    many = dataclasses.replace(sweep.many, trainable=sweep.state.trainable)
    trained = (np.asarray(update_counts(sweep.state.opt_state)) > 0) | (not sweep.step)
    if not trained.any():
        raise NonFiniteError(
            f"every one of the {sweep.step} steps of every member had a loss or gradient that is "
            "not finite: nothing was trained, and no adapter is written. Lower the learning rates, "
            "use model.dtype bfloat16 or float32, or check the data"
        )
    adapters, losses = {}, {}
    notes = set()
    for index, member in enumerate(sweep.members):
        if not trained[index]:
            sweep.terminal.print(f"{member.name}: every step was skipped, so it has no adapter")
            continue
        known = sweep.evaluations[index]
        lora_flax.put_one(setup.model, many, index)
        adapter = output / member.name / "adapter"
        results = {f"after {s} steps": known[s] for s in (0, sweep.step) if s in known}
        record = sweep.record.as_dict()
        notes.add(export_adapter(setup, member.config, adapter, results, record))
        adapters[member.name] = adapter
        losses[member.name] = known.get(sweep.step, {}).get("eval_loss", sweep.losses[index])
    what = "loss" if sweep.held_out is None else "eval_loss"
    order = sorted(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
    rows = [
        {
            "name": name,
            what: None if math.isnan(losses[name]) else losses[name],
            "adapter": str(adapters[name]),
        }
        for name in order
    ]
    rows += [
        {"name": member.name, what: None, "adapter": None}
        for member in sweep.members
        if member.name not in adapters
    ]
    best = order[0]
    summary = {"best": best, "members": rows}
    lora_flax.write_atomically(output / "sweep.json", json.dumps(summary, indent=2) + "\n")
    for name in order:
        mark = "best" if name == best else "    "
        sweep.terminal.print(f"{mark}  {what} {losses[name]:.4f}  {name}")
    sweep.terminal.print(f"adapter: {adapters[best]}")
    for note in sorted(filter(None, notes)):
        sweep.terminal.print(note)
    return SweepResult(adapters, losses, best)


def _member(metrics: StepMetrics, index: int) -> StepMetrics:
    own: StepMetrics = jax.tree.map(lambda value: value[index], metrics)
    return own


def _stacked(batches: list[Batch]) -> Batch:
    """Stack batches `[A, B, S]` of unequal S into one `[N, A, B, S]`, padding the shorter ones."""
    length = max(batch["tokens"].shape[-1] for batch in batches)

    def widen(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, 0), (0, 0), (0, length - array.shape[-1])])

    return {name: np.stack([widen(batch[name]) for batch in batches]) for name in batches[0]}
