"""What a run is asked while it trains, and the adapter that it leaves."""

from __future__ import annotations

from pathlib import Path

import jax
from flax import nnx

import lora_flax
from phi3_jax.errors import UserError
from phi3_jax.evaluation.answer_quality import Quiz, answerable, held_out_questions
from phi3_jax.generation.answers import stop_ids
from phi3_jax.training.hub import Pushes
from phi3_jax.training.output import export_adapter
from phi3_jax.training.progress import InProgress
from phi3_jax.training.schedule_free import averaged
from phi3_jax.training.setup import Setup
from phi3_jax.training.step import TrainState


def quiz_of(setup: Setup, rows: int) -> Quiz | None:
    """The questions of `eval_generate`, answered `rows` at a time; None without it.

    Raises:
        UserError: no held-out row has a prompt and an answer that fit the model.
    """
    training, tokenizer, checkpoint = setup.config.training, setup.tokenizer, setup.checkpoint
    if not training.eval_generate or setup.test is None:
        return None
    length, most = training.eval_generate_max_new_tokens, training.eval_generate_max_questions
    questions = held_out_questions(setup.config.data, tokenizer, setup.test.examples)[:most]
    questions = answerable(questions, length, checkpoint.config)
    if not questions:
        raise UserError("training.eval_generate: every held-out prompt fills the model's positions")
    stops = stop_ids(checkpoint.directory, tokenizer)
    return Quiz(questions, tokenizer, stops, rows, length)


def write_adapter(
    run: InProgress, setup: Setup, folder: Path, step: int, state: TrainState
) -> str | None:
    """Write the PEFT adapter of a step; the line to print about its readers (`export_adapter`)."""
    weights = averaged(run.config, state.opt_state, state.trainable)
    nnx.update(setup.model, jax.tree.map(lora_flax.on_host, weights))
    record, known = run.record, run.evaluations[0]
    return export_adapter(setup, setup.config, folder, step, known, record.folder, record.as_dict())


def take_best(run: InProgress, fall_back: bool) -> int:
    """The step that is exported: with `load_best_model_at_end` the best, whose state the run takes.

    Raises:
        UserError: a checkpoint that may be the best is damaged, and no other will do (`fall_back`).
    """
    step = run.step
    if run.config.load_best_model_at_end:
        best = run.checkpoints.restore_best(run.state, fall_back)
        if best is not None:
            step, run.state = best
            run.terminal.print(f"exporting the best checkpoint, step {step}")
    run.record.exports(step)
    return step


def export(run: InProgress, setup: Setup, pushes: Pushes, adapter: Path, step: int) -> Path:
    """Write the PEFT adapter of the run's state, of this step, with its card and tokenizer."""
    note = write_adapter(run, setup, adapter, step, run.state)
    run.terminal.print(f"adapter: {adapter}")
    if note is not None:
        run.terminal.print(note)
    pushes.last(adapter)
    return adapter
