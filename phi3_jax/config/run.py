"""The complete run config: all sections, and the consistency checks between them."""

from __future__ import annotations

from typing import cast

from pydantic import model_validator

from lora_flax import LoraError
from phi3_jax.config.data import DataConfig
from phi3_jax.config.optimizers import OPTIMIZERS, args_problems
from phi3_jax.config.paths import path_problems
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
# What an evaluation measures, and what eval_generate adds.
METRICS = ("eval_loss", "eval_perplexity", "eval_mean_token_accuracy")
ANSWER_METRICS = (
    "eval_rouge1",
    "eval_rouge2",
    "eval_rougeL",
    "eval_rougeLsum",
    "eval_exact_match",
    "eval_token_f1",
)
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
        problems += path_problems(self)
        problems += self._optimizer_problems()
        if training.max_steps == 0:
            problems.append(
                "training.max_steps: 0 steps train nothing; use -1 to train for num_train_epochs"
            )
        if training.loss_type == "dft" and training.label_smoothing_factor:
            problems.append("training.label_smoothing_factor: set it to 0 with loss_type: dft")
        problems += self._hub_problems()
        if "none" in training.report_to and len(training.report_to) > 1:
            problems.append(
                f"training.report_to: none cannot be combined with others, not {training.report_to}"
            )
        problems += streaming_problems(data, training, self.sweep)
        problems += self._too_large()
        problems += self._strategy_problems(bool(held_out))
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
        if training.hub_strategy == "every_save" and training.saving_strategy == "no":
            problems.append("training.hub_strategy: every_save needs save_steps or save_strategy")
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

    def _optimizer_problems(self) -> list[str]:
        """Settings of the optimizer, and conflicts between it and other keys."""
        training, name = self.training, self.training.optim
        optimizer = OPTIMIZERS[training.optimizer]
        if wrong := args_problems(name, training.optim_args):
            return [f"training.optim_args: {problem}" for problem in wrong]
        problems = []
        if training.loraplus_lr_ratio != 1 and not optimizer.loraplus:
            problems.append(f"training.loraplus_lr_ratio: {name} does not support it; set it to 1")
        if training.optimizer == "sgd" and training.optim_args.get("nesterov"):
            if not training.optim_args.get("momentum"):
                problems.append("training.optim_args: nesterov needs momentum")
        if name.startswith("schedule_free"):
            if not training.lr_scheduler_type.startswith("constant"):
                problems.append(
                    f"training.lr_scheduler_type: {name} averages the weights in place of a decay; "
                    f"set constant, with or without warmup_steps, not {training.lr_scheduler_type}"
                )
            if training.adam_beta1 == 0:
                problems.append(f"training.adam_beta1: {name} needs one above 0")
            if name == "schedule_free_radam" and training.adam_beta2 <= 0.6:
                problems.append(
                    f"training.adam_beta2: {name} needs one above 0.6, below which its rate is 0"
                )
        decay = training.learning_rate * training.weight_decay
        if training.optimizer == "lora_muon" and decay >= 1:
            problems.append(
                f"training.weight_decay: lora_muon needs learning_rate * weight_decay below 1, not "
                f"{decay:g}"
            )
        if self.sweep.values:
            problems += self._optimizer_sweep_problems()
        return problems

    def _optimizer_sweep_problems(self) -> list[str]:
        name, optimizer = self.training.optim, OPTIMIZERS[self.training.optimizer]
        decays = self.training.optimizer == "lora_muon" and self.training.weight_decay
        if not optimizer.sweep or decays:
            with_decay = " with weight_decay" if decays else ""
            return [
                f"training.optim: the updates of {name}{with_decay} are not proportional to the "
                "learning rate, by which a sweep scales them; train the members as separate runs"
            ]
        if optimizer.whole and len(self.sweep.r) > 1:
            return [
                f"training.optim: {name} looks at whole matrices, and a sweep pads them to the "
                "largest r; train the members as separate runs"
            ]
        return []

    def _sweep_problems(self) -> list[str]:
        problems = [
            f"sweep.{name}: duplicate value in {values}"
            for name, values in self.sweep.values.items()
            if len(set(values)) < len(values)
        ]
        stop = self.sweep.stop
        if not self.sweep.values:
            if stop:
                problems.append("sweep.stop: there are no members; set a list, such as sweep.r")
            return problems
        if stop and not self._held_out():
            problems.append(
                f"sweep.stop: {stop} needs held-out rows; set data.test_size, data.test_split or "
                "data.test_path"
            )
        if sorted(set(stop)) != stop:
            problems.append(f"sweep.stop: {stop} must be increasing steps")
        if self.peft.adapter_name_or_path is not None:
            problems.append("peft.adapter_name_or_path: a sweep only trains new adapters")
        if self.training.lr_scheduler_type == "polynomial":
            problems.append(
                "training.lr_scheduler_type: polynomial ends at a fixed lr_end, but a sweep scales "
                "one schedule to each member's learning rate"
            )
        if "min_lr" in self.training.lr_scheduler_kwargs:
            problems.append("training.lr_scheduler_kwargs: a sweep needs min_lr_rate, not min_lr")
        if self.training.push_to_hub:
            problems.append("training.push_to_hub: a sweep pushes nothing; use `phi3-jax push`")
        problems += [
            f"training.{key}: a sweep trains, saves and exports all members to the last step"
            for key, value in (
                ("load_best_model_at_end", self.training.load_best_model_at_end),
                ("early_stopping_patience", self.training.early_stopping_patience is not None),
                ("save_strategy", self.training.save_strategy == "best"),
            )
            if value
        ]
        if self.training.eval_generate:
            problems.append(
                "training.eval_generate: a sweep generates nothing; compare its adapters with "
                "`phi3-jax evaluate`"
            )
        return problems

    def _strategy_problems(self, holds_out: bool) -> list[str]:
        """Conflicts between when to evaluate, save and stop."""
        training = self.training
        evaluates, saves = training.evaluation_strategy, training.saving_strategy
        needs_rows = {
            "eval_steps": training.eval_steps,
            "eval_strategy": training.eval_strategy if evaluates != "no" else None,
            "save_strategy": saves if saves == "best" else None,
            "load_best_model_at_end": training.load_best_model_at_end or None,
            "early_stopping_patience": training.early_stopping_patience,
            "eval_generate": training.eval_generate or None,
        }
        wanted = {key: value for key, value in needs_rows.items() if value is not None}
        problems = []
        if not holds_out:
            problems += [
                f"training.{key}: {value} needs held-out rows; set data.test_size, "
                "data.test_split or data.test_path"
                for key, value in wanted.items()
            ]
        for steps, strategy in (("eval_steps", evaluates), ("save_steps", saves)):
            if getattr(training, steps) is not None and strategy != "steps":
                key = steps.replace("steps", "strategy")
                problems.append(
                    f"training.{steps}: {getattr(training, steps)} has no effect with {key}: "
                    f"{strategy}; remove one of them"
                )
        if evaluates == "no":
            problems += [
                f"training.{key}: {wanted[key]} needs evaluations; set eval_steps or eval_strategy"
                for key in ("save_strategy", "early_stopping_patience")
                if key in wanted
            ]
        if training.load_best_model_at_end:
            problems += self._best_needs(evaluates, saves)
        known = METRICS + (ANSWER_METRICS if training.eval_generate else ())
        if training.best_metric not in known:
            problems.append(
                f"training.metric_for_best_model: {training.metric_for_best_model!r} is not among "
                f"the metrics of this run's evaluations: {', '.join(known)}"
            )
        return problems

    def _best_needs(self, evaluates: str, saves: str) -> list[str]:
        """Why some checkpoint would have no evaluation to compare it by."""
        evaluate, save = self.training.evaluation_steps, self.training.saving_steps
        if "no" in (evaluates, saves):
            missing = [
                f"{name}_strategy is no"
                for name, strategy in (("eval", evaluates), ("save", saves))
                if strategy == "no"
            ]
            return [
                "training.load_best_model_at_end: needs evaluations and checkpoints, but "
                f"{' and '.join(missing)}: set eval_steps and save_steps, or the strategies"
            ]
        if saves not in ("best", evaluates):
            return [
                f"training.save_strategy: {saves} must be best or, like eval_strategy, {evaluates} "
                "for load_best_model_at_end, so that every checkpoint is evaluated"
            ]
        # Fractions become steps when the data are known.
        if saves == "steps" and min(evaluate, save) >= 1 and save % evaluate:
            return [
                f"training.save_steps: {save} must be a multiple of eval_steps {evaluate} for "
                "load_best_model_at_end, so that every checkpoint is evaluated"
            ]
        return []

    def to_yaml(self) -> str:
        """The whole config with every default filled in; `load_config` reads it back."""
        return dump_yaml(self.model_dump())


# The sections by name, in the order of a file.
SECTIONS: dict[str, type[Section]] = {
    name: cast("type[Section]", field.annotation) for name, field in RunConfig.model_fields.items()
}
