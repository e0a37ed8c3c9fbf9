"""How good generated answers are: ROUGE, exact match and F1 against the held-out ones.

For every held-out chat, the model generates the last answer: the tokens before it are the prompt
and its text is the reference. Decoding is greedy and batched. ROUGE is Google's `rouge-score`,
with stemming as in the Phi-3 guide's notebooks.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from phi3_jax.config.data import DataConfig
from phi3_jax.data.loading import load_held_out
from phi3_jax.data.masks import Example
from phi3_jax.errors import UserError
from phi3_jax.generation.answers import decode, generate_batched
from phi3_jax.generation.prompts import rooms
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclasses.dataclass(frozen=True)
class Question:
    """One held-out chat: the tokens leading up to its last answer, and that answer's text."""

    prompt: list[int]
    reference: str


@dataclasses.dataclass(frozen=True)
class Quiz:
    """Questions that a run answers at each of its evaluations.

    Attributes:
        questions: those that leave room for an answer.
        tokenizer: the base model's.
        stops: token ids that end an answer.
        rows: how many are answered at once.
        max_new_tokens: maximum tokens per answer.
    """

    questions: list[Question]
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]
    rows: int
    max_new_tokens: int

    def grade(self, model: Phi3, poll: Callable[[], None]) -> dict[str, float]:
        """The answers' metrics (`answer_metrics`), with the prefix `eval_`.

        Args:
            model: the model with its current weights.
            poll: called before each batch; may raise.
        """
        prompts = [question.prompt for question in self.questions]
        new = generate_batched(
            model, prompts, self.rows, self.max_new_tokens, poll=poll, eos_ids=self.stops
        )
        answers = [decode(tokens or [], self.tokenizer) for tokens in new]
        references = [question.reference for question in self.questions]
        found = answer_metrics(answers, references, rouge_scorer())
        return {f"eval_{name}": value for name, value in found.items()}


def answer_metrics(
    answers: Sequence[str], references: Sequence[str], scorer: Any
) -> dict[str, float]:
    """Metrics averaged over the answers, each times 100: ROUGE's, `exact_match` and `token_f1`."""
    sums: dict[str, float] = dict.fromkeys((*ROUGE, "exact_match", "token_f1"), 0.0)
    for answer, reference in zip(answers, references, strict=True):
        for name, score in scorer.score(reference, answer).items():
            sums[name] += score.fmeasure
        ours, theirs = normalize(answer), normalize(reference)
        sums["exact_match"] += float(ours == theirs)
        sums["token_f1"] += token_f1(ours, theirs)
    return {name: 100 * total / len(answers) for name, total in sums.items()}


def normalize(text: str) -> str:
    """SQuAD normalization: lowercase, no punctuation or articles, single spaces.

    Rajpurkar et al. 2016.
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, reference: str) -> float:
    """SQuAD's word-level F1 (harmonic mean of precision and recall); 1 if both are empty."""
    ours, theirs = answer.split(), reference.split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def last_answer(example: Example, tokenizer: PreTrainedTokenizerBase) -> Question | None:
    """The question for a chat's last answer; None if no prompt precedes it."""
    (where,) = np.nonzero(example.targets)
    if not len(where):
        return None
    gaps = np.nonzero(np.diff(where) > 1)[0]
    first = int(where[gaps[-1] + 1] if len(gaps) else where[0])
    text = tokenizer.decode(example.tokens[first : where[-1] + 1], skip_special_tokens=True)
    return Question(example.tokens[:first].tolist(), str(text).strip()) if first else None


def held_out_questions(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[Question]:
    """The questions of the held-out examples.

    Args:
        data: the section that they come from.
        tokenizer: the base model's.
        examples: as `load_held_out` gives them; they are read again, with a mask of the answers,
            where the loss is not only on these.

    Raises:
        UserError: no row has a prompt and an answer.
    """
    if not data.assistant_only_loss:
        masked = load_held_out(data.model_copy(update={"assistant_only_loss": True}), tokenizer)
        examples = masked.examples if masked else []
    found = (last_answer(example, tokenizer) for example in examples)
    questions = [question for question in found if question is not None]
    if not questions:
        raise UserError("no held-out row has a prompt and an answer")
    return questions


def answerable(
    questions: Sequence[Question], max_new_tokens: int, config: Phi3Config
) -> list[Question]:
    """The questions whose prompt does not fill the model's positions by itself."""
    limits = rooms([question.prompt for question in questions], max_new_tokens, config)
    return [question for question, limit in zip(questions, limits, strict=True) if limit]


def rouge_scorer() -> Any:
    """Google's scorer.

    Raises:
        UserError: it is not installed.
    """
    try:
        rouge = importlib.import_module("rouge_score.rouge_scorer")
    except ImportError:
        raise UserError("ROUGE needs rouge-score: pip install 'phi3-jax[evaluate]'") from None
    return rouge.RougeScorer(ROUGE, use_stemmer=True)
