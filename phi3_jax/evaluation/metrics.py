"""Held-out loss and answer quality, comparing the base with the adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from flax import nnx
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

import lora_flax
from phi3_jax.checkpoint.adapters import read_quantization, require_adapter
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.checkpoint.hub import resolve
from phi3_jax.checkpoint.vocabulary import add_token_rows, load_adapter
from phi3_jax.config.data import DataConfig
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.loading import load_held_out
from phi3_jax.data.masks import Example
from phi3_jax.data.tokenizer import new_token_ids, tokenizer_of
from phi3_jax.errors import UserError
from phi3_jax.evaluation.answer_quality import (
    Question,
    answer_metrics,
    answerable,
    held_out_questions,
    rouge_scorer,
)
from phi3_jax.evaluation.held_out import held_out_metrics, jit_eval_step
from phi3_jax.generation.answers import decode, generate_batched, stop_ids
from phi3_jax.generation.prompts import rooms
from phi3_jax.model.network import Phi3
from phi3_jax.platform import compute_dtype
from phi3_jax.quickstart import local_paths


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation results.

    Attributes:
        metrics: keyed by model (`base`, `adapter`), then by name: `loss`, `perplexity`,
            `token_accuracy`, and for the answers `rouge1`, `rouge2`, `rougeL`, `rougeLsum`,
            `exact_match`, `token_f1`, the answer metrics times 100. Those of answers are missing if
            no question was answered.
        samples: for each answered question, the prompt text, the reference, and each model's
            answer.
        questions: how many questions were `answered`, were answered with room for fewer than the
            maximum of new tokens (`shortened`), and were `unanswered` because their prompt fills
            the model's positions by itself.
    """

    metrics: dict[str, dict[str, float]]
    samples: list[dict[str, str]]
    questions: dict[str, int]


def evaluate(
    config: RunConfig,
    adapter: str | Path | None,
    max_new_tokens: int = 64,
    max_questions: int | None = None,
) -> Evaluation:
    """Evaluate the base and, if given, the adapter on the config's held-out rows.

    Args:
        config: a run's config; `model`, `data` and the evaluation batch size are used. Without
            `model.quantization`, the base has that which the adapter was trained over, if any.
        adapter: folder or hub id of a PEFT adapter; by default the one that the config continues
            from, if any.
        max_new_tokens: maximum tokens per answer; fewer where the model's positions end.
        max_questions: answer only this many questions, from the start; the loss covers all rows.

    Raises:
        UserError: no held-out rows, none with an answer, or bad paths.
        lora_flax.LoraError: the adapter does not match the model.
    """
    scorer = rouge_scorer()
    config = local_paths(config)
    revision = None if adapter else config.peft.adapter_revision
    adapter = adapter or config.peft.adapter_name_or_path
    folder = None if adapter is None else resolve(adapter, revision)
    if folder is not None:
        require_adapter(folder)
    checkpoint = Checkpoint.open(config.model.path, config.model.revision)
    tokenizer = tokenizer_of(checkpoint.directory, folder, config.data)
    examples, questions = _held_out(config.data, tokenizer)
    plan = BatchPlan.from_config(config.data, config.training)
    questions = questions[:max_questions]
    limits = rooms([q.prompt for q in questions], max_new_tokens, checkpoint.config)
    counts = {
        "answered": sum(limit > 0 for limit in limits),
        "shortened": sum(0 < limit < max_new_tokens for limit in limits),
        "unanswered": sum(limit == 0 for limit in limits),
    }
    questions = answerable(questions, max_new_tokens, checkpoint.config)
    quantization = config.model.bitsandbytes
    if quantization is None and folder is not None:
        quantization = read_quantization(folder)
    model = checkpoint.load(
        compute_dtype(config.model.dtype),
        quantization=quantization,
        rope_factors=config.model.rope_factors,
    )
    models = ["base"]
    if folder is not None:
        load_adapter(model, folder)
        models.append("adapter")
    elif ids := new_token_ids(tokenizer, config.data.new_tokens):
        add_token_rows(model, ids)
    stops = stop_ids(checkpoint.directory, tokenizer)
    metrics: dict[str, dict[str, float]] = {}
    samples = [
        {"prompt": str(tokenizer.decode(q.prompt)), "reference": q.reference} for q in questions
    ]
    for name in models:
        if name == "base" and folder is not None:
            with lora_flax.disable_adapter(model):
                metrics[name], answers = _measure(
                    model, plan, examples, questions, tokenizer, stops, max_new_tokens
                )
        else:
            metrics[name], answers = _measure(
                model, plan, examples, questions, tokenizer, stops, max_new_tokens
            )
        if questions:
            metrics[name] |= answer_metrics(answers, [q.reference for q in questions], scorer)
        for sample, answer in zip(samples, answers, strict=True):
            sample[name] = answer
    return Evaluation(metrics, samples, counts)


def write_evaluation(evaluation: Evaluation, directory: Path) -> None:
    """Write `evaluation.json` and `evaluation_samples.jsonl`, creating the folder if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(sample) + "\n" for sample in evaluation.samples)
    lora_flax.write_atomically(directory / "evaluation_samples.jsonl", lines)
    summary = evaluation.metrics | {"questions": evaluation.questions}
    lora_flax.write_atomically(directory / "evaluation.json", json.dumps(summary, indent=2) + "\n")


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the models side by side, and how many questions could not be answered in full."""
    table = Table("metric", *evaluation.metrics)
    for metric in next(iter(evaluation.metrics.values())):
        table.add_row(metric, *(f"{m[metric]:.4f}" for m in evaluation.metrics.values()))
    console.print(table)
    counts = evaluation.questions
    if counts["unanswered"] or counts["shortened"]:
        console.print(
            f"{counts['answered']} questions answered, {counts['shortened']} of them with room for "
            f"fewer new tokens; {counts['unanswered']} not answered, for the prompt alone fills "
            "the model's positions",
            soft_wrap=True,
        )


def _measure(
    model: Phi3,
    plan: BatchPlan,
    examples: Sequence[Example],
    questions: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    max_new_tokens: int,
) -> tuple[dict[str, float], list[str]]:
    """Held-out metrics, and the answers in question order."""
    graphdef, state = nnx.split(model)
    eval_step = jit_eval_step(graphdef)
    (held_out,) = held_out_metrics(
        lambda batch: eval_step(state, nnx.State({}), batch), plan.eval_batches(examples)
    )
    prompts = [question.prompt for question in questions]
    new = generate_batched(model, prompts, plan.eval_rows, max_new_tokens, eos_ids=stops)
    return held_out._asdict(), [decode(tokens or [], tokenizer) for tokens in new]


def _held_out(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Example], list[Question]]:
    test = load_held_out(data, tokenizer)
    if test is None:
        raise UserError(
            "nothing is held out: set data.test_size, data.test_split or data.test_path"
        )
    return test.examples, held_out_questions(data, tokenizer, test.examples)
