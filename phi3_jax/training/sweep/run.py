"""Train several adapters at once on one frozen base, compare them, and report the best.

Every combination of the lists in `sweep:` is a member. A compiled step runs a group of them and
reads each base weight once. Each member has its own metrics and exports its own PEFT adapter, the
same one a separate run would produce.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import jax
from flax import nnx

import lora_flax
from phi3_jax.advice.start import clock_of
from phi3_jax.config.loader import RunConfig
from phi3_jax.config.training import TrainingConfig
from phi3_jax.data.batches import Batches, BatchPlan
from phi3_jax.errors import UserError
from phi3_jax.sharding.mesh import MEMBER, place, row_devices, token_devices
from phi3_jax.sharding.processes import is_first
from phi3_jax.sharding.rules import state_shardings
from phi3_jax.training.checkpoints import Checkpoints, saved_choices
from phi3_jax.training.facts import run_facts
from phi3_jax.training.interrupt import collect_signals, end_at_once
from phi3_jax.training.lora_matmul import refuse_sweep
from phi3_jax.training.metrics import StepFlops, open_metrics, read_evaluations, read_loss
from phi3_jax.training.optimizer import make_optimizer, planned_steps, total_steps
from phi3_jax.training.output import Resume, open_output
from phi3_jax.training.profiling import Profile
from phi3_jax.training.progress import take_steps
from phi3_jax.training.record import open_record
from phi3_jax.training.remat import choose_remat
from phi3_jax.training.schedules import learning_rate_schedule
from phi3_jax.training.setup import identity_of, loss_settings, set_up
from phi3_jax.training.step import TrainState
from phi3_jax.training.strategies import Strategies
from phi3_jax.training.sweep.export import SweepResult, compare, export, trained_members
from phi3_jax.training.sweep.members import sweep_members
from phi3_jax.training.sweep.progress import Sweep
from phi3_jax.training.sweep.step import (
    jit_sweep_eval_step,
    jit_sweep_step,
    spread,
    stacked_shardings,
    stacked_state_shardings,
)
from phi3_jax.training.terminal import Terminal
from phi3_jax.training.trackers import check_trackers


def train_sweep(
    config: RunConfig, resume: Resume = False, command: str | None = None, keep: bool = True
) -> SweepResult:
    """Train all members of the sweep and export the adapters of those that did not stop early.

    A member with a non-finite loss or gradient skips that step and continues, whatever
    `on_nonfinite` says, so that it does not stop the others.

    Args:
        config: a config with lists in `sweep`.
        resume, command: as for `train`.
        keep: write the adapters and a report; otherwise only the losses are of interest.

    Raises:
        UserError, lora_flax.LoraError: bad input.
        NonFiniteError: every step of every member was skipped.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    refuse_sweep(config)
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
        config, training, mesh = setup.config, setup.config.training, setup.mesh
        stack.enter_context(jax.set_mesh(mesh))
        members = sweep_members(config)
        seeds = [member.config.training.seed for member in members]
        plan = BatchPlan.from_config(config.data, training, row_devices(mesh))
        batches = {seed: plan.train_batches(setup.train.examples, seed) for seed in seeds}
        steps_per_epoch = _one_length(training, batches)
        steps = total_steps(training, steps_per_epoch)
        if late := [stop for stop in config.sweep.stop if stop >= steps]:
            raise UserError(f"sweep.stop: {late} must be below the number of steps, {steps}")

        # --- Adapters ----------------------------------------------------------------------------
        record.enter("adapters")
        many = lora_flax.wrap_many(
            setup.model,
            [setup.lora_of(member.config) for member in members],
            [nnx.Rngs(seed) for seed in seeds],
        )
        # Updates are computed with a learning rate of 1, then scaled by each member's rate.
        unit = training.model_copy(update={"learning_rate": 1.0})
        tx = make_optimizer(unit, steps, setup.model)
        state = TrainState(many.trainable, jax.vmap(tx.init)(many.trainable))
        remat = choose_remat(setup, chosen.get("remat"), len(members))

        # --- Resume ------------------------------------------------------------------------------
        planned = planned_steps(training, steps_per_epoch)
        identity = identity_of(setup, row_devices(mesh), planned)
        checkpoints = Checkpoints(opened.checkpoints, identity, training.save_total_limit, opened)
        stack.enter_context(checkpoints)
        first_step, state = checkpoints.start(state, opened.resume, opened.fall_back)

        # --- Mesh placement and step -------------------------------------------------------------
        stacked = -(-len(members) // mesh.shape[MEMBER]) * mesh.shape[MEMBER]
        # Placed the way a step returns it; otherwise the second step would recompile.
        shardings = stacked_state_shardings(tx, many.trainable, mesh)
        state = spread(state, shardings, stacked)
        loss = loss_settings(training, token_devices(mesh))
        train_step = jit_sweep_step(many.graphdef, tx, remat, loss, shardings)

        # --- Log ---------------------------------------------------------------------------------
        profile = Profile.of_run(training.profile_steps, output, first_step, steps)
        record.begin(first_step, steps, run_facts(setup, None))
        terminal = stack.enter_context(Terminal(steps, first_step, not is_first(), record.warn))
        folders = [output / member.name for member in members]
        writers = []
        for member, folder in zip(members, folders, strict=True):
            if is_first():
                folder.mkdir(parents=True, exist_ok=True)
                lora_flax.write_atomically(folder / "config.yaml", member.config.to_yaml())
            opening = open_metrics(member.config, folder, first_step, terminal.print)
            writers.append(stack.enter_context(opening))
        if is_first():
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
            checkpoints=checkpoints,
            terminal=terminal,
            writers=writers,
            evaluations=[read_evaluations(folder) for folder in folders],
            losses=[read_loss(folder) for folder in folders],
            state=state,
            step=first_step,
            received=stack.enter_context(collect_signals()),
            clock=clock_of(batches[seed] for seed in seeds),
            record=record,
            flops=StepFlops.on(setup.checkpoint.config, list(mesh.devices.flat)),
            profile=stack.enter_context(contextlib.closing(profile)),
            sweep=config.sweep,
            members=members,
            mesh=mesh,
            batches=batches,
            schedule=learning_rate_schedule(unit, steps),
            train_step=train_step,
            eval_step=jit_sweep_eval_step(many.graphdef, mesh),
            constants=spread(many.constants, stacked_shardings(many.constants, mesh), stacked),
            frozen=place(many.frozen, state_shardings(many.frozen, mesh)),
        )
        if keep and not sweep.step:
            sweep.evaluate()
        take_steps(sweep)

        # --- Evaluation --------------------------------------------------------------------------
        if not keep:
            if not sweep.is_evaluated():
                sweep.evaluate()
            return compare(sweep, trained_members(sweep), {})
        sweep.end()
        end_at_once()

        # --- Export ------------------------------------------------------------------------------
        record.enter("export")
        result = export(sweep, many, setup, output)
        terminal.print(record.summary())
        terminal.print(record.end())
        return result


def _one_length(training: TrainingConfig, batches: Mapping[int, Batches]) -> int:
    """Steps of an epoch; of the first seed's, if nothing depends on them.

    A mixture of sources has other examples for each seed, which may fill more or fewer rows.

    Raises:
        UserError: the members' epochs differ, and something depends on them.
    """
    lengths = {seed: own.steps_per_epoch for seed, own in batches.items()}
    strategies = (training.logging_strategy, training.eval_strategy, training.save_strategy)
    if len(set(lengths.values())) > 1 and (training.max_steps <= 0 or "epoch" in strategies):
        each = ", ".join(f"{steps} with seed {seed}" for seed, steps in lengths.items())
        raise UserError(
            f"sweep.seed: with data.packing and data.sources an epoch has {each} steps, and the "
            "members train in step; set training.max_steps, and no strategy to epoch"
        )
    return next(iter(lengths.values()))
