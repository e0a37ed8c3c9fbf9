"""The config of a run: YAML in, typed and strict models out.

Keys are named as in Hugging Face's `TrainingArguments`, `SFTConfig` and PEFT's `LoraConfig` where the
thing is the same, so that a known recipe can be copied over. The descriptions below are the only
documentation of the keys: `train.py --help` and docs/config.md print them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_flax import LoraConfig
from phi3_jax.data.config import DataConfig
from phi3_jax.errors import UserError


class Section(BaseModel):
    """Strict: no unknown key, no string for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelConfig(Section):
    """The base model."""

    path: str = Field(description="Folder of a Hugging Face checkpoint, or a hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of frozen weights and activations; `auto` is float32 on CPU, else bfloat16.",
    )


class PeftConfig(Section):
    """The adapter."""

    r: int = Field(16, ge=1, description="Rank of the update.")
    lora_alpha: float = Field(32, gt=0, description="The update is scaled by lora_alpha / r.")
    lora_dropout: float = Field(
        0.05, ge=0, lt=1, description="Dropout on the input of the update, in training."
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Layers to adapt: names, one regular expression, or `all-linear` (qkv_proj, "
        "o_proj, gate_up_proj, down_proj).",
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r).")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Biases to train as well; Phi-3 has none."
    )
    adapter_name_or_path: str | None = Field(
        None,
        description="A PEFT adapter to go on from; its rank, alpha and targets hold instead of "
        "those above.",
    )

    def to_lora(self) -> LoraConfig:
        """The same as `lora_flax` takes it."""
        return LoraConfig(**self.model_dump(exclude={"adapter_name_or_path"}))


class TrainingConfig(Section):
    """How to train."""

    output_dir: str = Field(description="Where everything that the run leaves goes.")
    seed: int = Field(42, ge=0, lt=2**31, description="Of data order, dropout and the start of A.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; -1 goes by num_train_epochs.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Rows of a micro-batch.")
    per_device_eval_batch_size: int = Field(8, ge=1, description="Rows of an evaluation batch.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Micro-batches of a step; 4 x 2 gives what a batch of 8 gives."
    )
    learning_rate: float = Field(2e-4, ge=0, description="Highest learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Decay after the warm-up, to 0 at the last step."
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="Warm-up, as a share of all steps.")
    warmup_steps: int = Field(0, ge=0, description="Warm-up, in steps.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta2.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Clip the norm of the trainable gradients to this; 0 does not clip."
    )
    gradient_checkpointing: bool = Field(
        True, description="Recompute each layer in the backward pass: a third of the memory."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="A loss or gradient that is not finite stops the run, or skips the step.",
    )
    logging_steps: int = Field(10, ge=1, description="Log every so many steps.")
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Evaluate every so many steps; with held-out rows the run is evaluated at its "
        "start and end in any case.",
    )
    save_steps: int | None = Field(
        None, ge=1, description="Checkpoint every so many steps; the last step always is one."
    )
    save_total_limit: int | None = Field(
        None, ge=1, description="Keep so many checkpoints; the best one is kept besides."
    )
    load_best_model_at_end: bool = Field(
        False, description="Export the checkpoint with the lowest held-out loss."
    )
    report_to: list[Literal["tensorboard", "wandb", "none"]] = Field(
        ["tensorboard"], description="Where metrics go besides metrics.jsonl."
    )
    run_name: str | None = Field(None, description="Name of the run in wandb.")
    sample_prompts: list[str] = Field(
        [], description="User messages that are answered before and after training."
    )
    sample_max_new_tokens: int = Field(64, ge=1, description="Length of those answers.")


class RunConfig(Section):
    """Everything `python train.py --config FILE` is told."""

    model: ModelConfig
    peft: PeftConfig = PeftConfig()
    data: DataConfig
    training: TrainingConfig

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        data, training = self.data, self.training
        held_out = [
            key
            for key in ("test_path", "test_split", "test_size")
            if getattr(data, key) is not None
        ]
        problems = []
        if len(held_out) > 1:
            problems.append(f"data: only one of {', '.join(held_out)} can name the held-out rows")
        if isinstance(data.test_size, float) and data.test_size >= 1:
            problems.append(f"data.test_size: a share is below 1, not {data.test_size}")
        if training.warmup_ratio and training.warmup_steps:
            problems.append("training: give warmup_ratio or warmup_steps, not both")
        if training.max_steps == 0:
            problems.append("training.max_steps: 0 steps train nothing; -1 goes by epochs")
        if training.eval_steps and not held_out:
            problems.append(
                "training.eval_steps: nothing is held out; set data.test_size, test_split or "
                "test_path"
            )
        if "none" in training.report_to and len(training.report_to) > 1:
            problems.append("training.report_to: none stands alone")
        if training.load_best_model_at_end:
            problems += self._best_needs()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _best_needs(self) -> list[str]:
        training = self.training
        if not training.eval_steps or not training.save_steps:
            return ["training.load_best_model_at_end: needs eval_steps and save_steps"]
        if training.save_steps % training.eval_steps:
            return [
                f"training.save_steps: {training.save_steps} must be a multiple of eval_steps "
                f"{training.eval_steps}, so that each checkpoint has its held-out loss"
            ]
        return []

    def to_yaml(self) -> str:
        """The whole config with every default filled in; `load_config` reads it back."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "peft": PeftConfig,
    "data": DataConfig,
    "training": TrainingConfig,
}


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as the number it is and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 asks for a point in a float with an exponent and would read 1e-4 as a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML too).

    Raises:
        UserError: everything wrong with it at once: unknown keys with the nearest known one, wrong
            types and ranges, keys that contradict each other.
    """
    path = Path(path)
    raw = _read_mapping(path)
    for override in overrides:
        _apply(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(item)]
        raise UserError("\n".join(f"{path}: {line}" for line in lines)) from None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a safe loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: sections {', '.join(SECTIONS)} are expected, not {raw!r}")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise UserError(f"{override!r}: an override is section.key=value")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a safe loader)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {error}") from None
    values = raw.setdefault(section, {})
    if not isinstance(values, dict):
        raise UserError(f"{override!r}: {section} is no section in the file")
    values[name] = value


def _explain(item: Any) -> list[str]:
    """One pydantic error as lines `section.key: what is wrong`."""
    # Union members and list positions stand behind the key; the key is enough.
    key = ".".join(str(part) for part in item["loc"][:2])
    if item["type"] == "extra_forbidden":
        return [f"{key}: unknown key; {_nearest(key)}"]
    if item["type"] == "missing":
        return [f"{key}: missing"]
    if item["type"] == "value_error":
        return str(item["ctx"]["error"]).splitlines()
    message = item["msg"].removeprefix("Input should be ")
    return [f"{key}: {item['input']!r} should be {message}"]


def _nearest(key: str) -> str:
    known = list(SECTIONS) if "." not in key else [
        f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields
    ]
    # A known name in the wrong section is nearer than another name in this one.
    moved = [name for name in known if "." in key and name.split(".")[1] == key.split(".")[1]]
    close = moved or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    section = key.split(".")[0]
    names = SECTIONS[section].model_fields if section in SECTIONS else SECTIONS
    return f"known here: {', '.join(names)}"


def describe_keys() -> str:
    """Every key with its type, default and meaning, as Markdown."""
    lines = []
    for section, model in SECTIONS.items():
        lines += [f"## {section}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else f"`{_yaml_value(field.default)}`"
            lines.append(
                f"| `{name}` | {_type_name(field.annotation)} | {default} | {field.description} |"
            )
        lines.append("")
    return "\n".join(lines)


def _yaml_value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]


def _type_name(annotation: Any) -> str:
    arguments = get_args(annotation)
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if get_origin(annotation) is list:
        return f"list of {_type_name(arguments[0])}"
    if arguments:
        return " or ".join(_type_name(argument) for argument in arguments)
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}[
        annotation.__name__
    ]


HEADER = """# Config keys

`python train.py --config FILE [section.key=value ...]` reads a YAML file with the sections below.
This page is made by `python -m phi3_jax.training.config` from the code that reads the file.
"""

if __name__ == "__main__":
    print(HEADER)
    print(describe_keys().rstrip())
