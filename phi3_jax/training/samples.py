"""The sample prompts of a config, answered before and after training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from phi3_jax.config.training import TrainingConfig
from phi3_jax.generation.answers import answer, read_samples, stop_ids, write_samples
from phi3_jax.model.network import Phi3
from phi3_jax.report.folder import SAMPLES
from phi3_jax.sharding.processes import is_first
from phi3_jax.training.terminal import Terminal


@dataclasses.dataclass(frozen=True)
class Samples:
    """Answers to `training.sample_prompts`, kept in samples.jsonl.

    Attributes:
        config: the training section.
        base: folder of the base model.
        tokenizer: its tokenizer.
        output: the run's output folder.
    """

    config: TrainingConfig
    base: Path
    tokenizer: PreTrainedTokenizerBase
    output: Path

    def answer(self, when: Literal["before", "after"], model: Phi3, terminal: Terminal) -> None:
        """Answer the prompts, print the answers, and save them next to earlier ones.

        Answers from before training replace those of an earlier run.
        """
        prompts = self.config.sample_prompts
        if not prompts:
            return
        file = self.output / SAMPLES
        known = {record["prompt"]: record for record in read_samples(file)}
        if when == "before":
            known = {}
        stops = stop_ids(self.base, self.tokenizer)
        most = self.config.sample_max_new_tokens
        answers = answer(model, self.tokenizer, prompts, stops, most)
        records = []
        for prompt, text in zip(prompts, answers, strict=True):
            records.append(known.get(prompt, {"prompt": prompt}) | {when: text})
            indent = " " * len(when)
            terminal.print(f"{when}  user: {prompt}\n{indent}  assistant: {text}")
        if is_first():
            write_samples(file, records)
