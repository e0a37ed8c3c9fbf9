"""The complete run config: all sections, and the consistency checks between them."""

from __future__ import annotations

from typing import cast

from pydantic import model_validator

from lora_flax import LoraError
from phi3_jax.config.data import DataConfig
from phi3_jax.config.schedules import schedule_problems
from phi3_jax.config.sections import (
    MeshConfig,
    ModelConfig,
    PeftConfig,
    Section,
    SweepConfig,
)
from phi3_jax.config.streaming import streaming_problems
from phi3_jax.config.training import TrainingConfig
from phi3_jax.config.yaml_text import dump_yaml

# A step's rows are laid out on the host first: four int32 arrays of this size take 4 GiB.
MAX_STEP_TOKENS = 2**28
MAX_STEPS = 2**31 - 1  # a step's number is an int32 on the device


def _default(key: str) -> object:
    return DataConfig.model_fields[key].default


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
                f"data.{held_out[0]}: set only one of test_path, test_split and test_size, not "
                f"{' and '.join(held_out)}"
            )
        if isinstance(data.test_size, float) and data.test_size >= 1:
            problems.append(
                f"data.test_size: {data.test_size} must be a fraction below 1 or an integer number "
                "of rows"
            )
        if data.path is not None and data.sources:
            problems.append("data.path: set either path or sources")
        if data.sources:
            alone = ("name", "revision", "split", "format", "columns", "max_samples")
            problems += [
                f"data.{key}: set it in each of data.sources"
                for key in alone
                if key in data.model_fields_set and getattr(data, key) != _default(key)
            ]
        if data.dataset_text_field != "text" and "text" in (data.columns or {}):
            problems.append("data.dataset_text_field: data.columns names the text column as well")
        if training.gradient_checkpointing == "auto" and training.remat_policy != "full":
            problems.append(
                "training.remat_policy: it is what gradient_checkpointing: true recomputes; set "
                "that too"
            )
        if data.packing and training.train_sampling_strategy == "group_by_length":
            problems.append(
                "training.train_sampling_strategy: group_by_length has no effect on packed rows; "
                "set data.packing: false or use random"
            )
        if training.warmup_ratio and training.warmup_steps:
            problems.append(
                f"training.warmup_ratio: {training.warmup_ratio} and warmup_steps "
                f"{training.warmup_steps:g} are both set; set one of them to 0"
            )
        problems += [
            f"training.lr_scheduler_kwargs: {problem}"
            for problem in schedule_problems(
                training.lr_scheduler_type, training.lr_scheduler_kwargs, training.learning_rate
            )
        ]
        if training.max_steps == 0:
            problems.append(
                "training.max_steps: 0 steps train nothing; use -1 to train for num_train_epochs"
            )
        problems += self._hub_problems()
        if "none" in training.report_to and len(training.report_to) > 1:
            problems.append(
                f"training.report_to: none cannot be combined with others, not {training.report_to}"
            )
        problems += streaming_problems(data, training, self.sweep)
        problems += self._too_large()
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

    def _hub_problems(self) -> list[str]:
        training, problems = self.training, []
        if training.push_to_hub and training.hub_model_id is None:
            problems.append("training.push_to_hub: needs hub_model_id, such as USER/NAME")
        if training.hub_strategy == "every_save" and not training.push_to_hub:
            problems.append("training.hub_strategy: every_save needs push_to_hub: true")
        if training.hub_strategy == "every_save" and training.save_steps is None:
            problems.append("training.hub_strategy: every_save needs save_steps")
        return problems

    def _too_large(self) -> list[str]:
        """Steps whose rows do not fit the host, in place of a failing allocation later."""
        training, length = self.training, self.data.max_length
        steps = training.gradient_accumulation_steps
        problems = [
            f"training.{name}: {rows} rows x {times} x data.max_length {length} are more than "
            f"{MAX_STEP_TOKENS:,} tokens per step and device"
            for name, rows, times in (
                ("per_device_train_batch_size", training.per_device_train_batch_size, steps),
                ("per_device_eval_batch_size", training.per_device_eval_batch_size, 1),
            )
            if rows * times * length > MAX_STEP_TOKENS
        ]
        if training.num_train_epochs > MAX_STEPS:
            problems.append(f"training.num_train_epochs: more than {MAX_STEPS:,} epochs")
        return problems

    def _held_out(self) -> list[str]:
        """The keys that specify held-out rows."""
        keys = ("test_path", "test_split", "test_size")
        return [key for key in keys if getattr(self.data, key) is not None]

    def _start_problems(self, start: bool | str) -> list[str]:
        """Conflicts between an initialization of A and B and the other sections."""
        problems = []
        if start in ("loftq", "qera") and self.model.quantization is None:
            problems.append(f"peft.init_lora_weights: {start} needs model.quantization")
        if self.sweep.values and start == "eva":
            problems.append(
                "peft.init_lora_weights: eva redistributes ranks, and a sweep needs equal ones"
            )
        if self.sweep.values and start in ("loftq", "qera"):
            problems.append(f"peft.init_lora_weights: a sweep does not support {start}")
        return problems

    def _sweep_problems(self) -> list[str]:
        problems = [
            f"sweep.{name}: duplicate value in {values}"
            for name, values in self.sweep.values.items()
            if len(set(values)) < len(values)
        ]
        if not self.sweep.values:
            return problems
        if self.peft.adapter_name_or_path is not None:
            problems.append("peft.adapter_name_or_path: a sweep only trains new adapters")
        if self.mesh.sizes not in (None, (1, 1, 1)):
            problems.append("mesh: a sweep runs on a single device")
        if self.training.lr_scheduler_type == "polynomial":
            problems.append(
                "training.lr_scheduler_type: polynomial ends at a fixed lr_end, but a sweep scales "
                "one schedule to each member's learning rate"
            )
        if "min_lr" in self.training.lr_scheduler_kwargs:
            problems.append("training.lr_scheduler_kwargs: a sweep needs min_lr_rate, not min_lr")
        if self.training.push_to_hub:
            problems.append("training.push_to_hub: a sweep pushes nothing; use `phi3-jax push`")
        if self.training.load_best_model_at_end:
            problems.append("training.load_best_model_at_end: a sweep always exports the last step")
        return problems

    def _best_needs(self) -> list[str]:
        evaluate, save = self.training.eval_steps, self.training.save_steps
        if not evaluate or not save:
            return [
                "training.load_best_model_at_end: needs eval_steps and save_steps, which are "
                f"{evaluate} and {save}"
            ]
        if save % evaluate:
            return [
                f"training.save_steps: {save} must be a multiple of eval_steps {evaluate} for "
                "load_best_model_at_end, so that every checkpoint has a held-out loss"
            ]
        return []

    def to_yaml(self) -> str:
        """The whole config with every default filled in; `load_config` reads it back."""
        return dump_yaml(self.model_dump())


# The sections by name, in the order of a file.
SECTIONS: dict[str, type[Section]] = {
    name: cast("type[Section]", field.annotation) for name, field in RunConfig.model_fields.items()
}
