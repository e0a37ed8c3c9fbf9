"""The complete run config: all sections, and the consistency checks between them."""

from __future__ import annotations

from typing import cast

import yaml
from pydantic import model_validator

from lora_flax import LoraError
from phi3_jax.config.data import DataConfig
from phi3_jax.config.sections import (
    MeshConfig,
    ModelConfig,
    PeftConfig,
    Section,
    SweepConfig,
    TrainingConfig,
)


class RunConfig(Section):
    """Everything that a config file can set."""

    model: ModelConfig
    peft: PeftConfig = PeftConfig()
    data: DataConfig
    training: TrainingConfig
    sweep: SweepConfig = SweepConfig()
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        data, training = self.data, self.training
        problems = []
        if len(held_out := self._held_out()) > 1:
            problems.append(
                f"data.{held_out[0]}: only one of test_path, test_split and test_size can name the "
                f"held-out rows, not {' and '.join(held_out)}"
            )
        if isinstance(data.test_size, float) and data.test_size >= 1:
            problems.append(
                f"data.test_size: {data.test_size} is no share (below 1) and no number of rows "
                "(an integer)"
            )
        if training.warmup_ratio and training.warmup_steps:
            problems.append(
                f"training.warmup_ratio: {training.warmup_ratio} and warmup_steps "
                f"{training.warmup_steps} are two warm-ups; set one of them to 0"
            )
        if training.max_steps == 0:
            problems.append("training.max_steps: 0 steps train nothing; -1 goes by epochs")
        if "none" in training.report_to and len(training.report_to) > 1:
            problems.append(f"training.report_to: none stands alone, not in {training.report_to}")
        for key in ("eval_steps", "load_best_model_at_end"):
            if getattr(training, key) and not held_out:
                problems.append(
                    f"training.{key}: {getattr(training, key)} needs held-out rows; set "
                    "data.test_size, data.test_split or data.test_path"
                )
        if training.load_best_model_at_end:
            problems += self._best_needs()
        problems += self._sweep_problems()
        try:
            start = self.peft.to_lora().init_lora_weights
        except LoraError as error:
            problems.append(f"peft: {error}")
        else:
            problems += self._start_problems(start)
        try:
            _ = self.model.bitsandbytes
        except LoraError as error:
            problems.append(f"model.quantization: {error}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _held_out(self) -> list[str]:
        """The keys that specify held-out rows."""
        keys = ("test_path", "test_split", "test_size")
        return [key for key in keys if getattr(self.data, key) is not None]

    def _start_problems(self, start: bool | str) -> list[str]:
        """What the rest of the config must say for an initialization of A and B."""
        problems = []
        if start in ("loftq", "qera") and self.model.quantization is None:
            problems.append(f"peft.init_lora_weights: {start} needs model.quantization")
        if self.sweep.values and start == "eva":
            problems.append("peft.init_lora_weights: eva moves ranks, which a sweep shares")
        if self.sweep.values and start in ("loftq", "qera"):
            problems.append(f"peft.init_lora_weights: {start} is for one adapter, not for a sweep")
        return problems

    def _sweep_problems(self) -> list[str]:
        problems = [
            f"sweep.{name}: {values} has one value twice"
            for name, values in self.sweep.values.items()
            if len(set(values)) < len(values)
        ]
        if not self.sweep.values:
            return problems
        if self.peft.adapter_name_or_path is not None:
            problems.append("peft.adapter_name_or_path: a sweep starts its adapters anew")
        if self.mesh.sizes not in (None, (1, 1, 1)):
            problems.append("mesh: a sweep runs on one device")
        if self.training.load_best_model_at_end:
            problems.append("training.load_best_model_at_end: a sweep exports the last step")
        return problems

    def _best_needs(self) -> list[str]:
        evaluate, save = self.training.eval_steps, self.training.save_steps
        if not evaluate or not save:
            return [
                "training.load_best_model_at_end: needs eval_steps and save_steps, not "
                f"{evaluate} and {save}"
            ]
        if save % evaluate:
            return [
                f"training.save_steps: {save} must be a multiple of eval_steps {evaluate} for "
                "load_best_model_at_end, so that each checkpoint has its held-out loss"
            ]
        return []

    def to_yaml(self) -> str:
        """The whole config with every default filled in; `load_config` reads it back."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


# The sections by name, in the order of a file.
SECTIONS: dict[str, type[Section]] = {
    name: cast("type[Section]", field.annotation) for name, field in RunConfig.model_fields.items()
}
