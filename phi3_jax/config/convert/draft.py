"""A config in the making: what is left of the other program's file, and what it became."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from phi3_jax.config.foreign import MISSING, NOT_APPLICABLE, OTHER_NAMES
from phi3_jax.config.optimizers import name_problem
from phi3_jax.config.run import SECTIONS
from phi3_jax.config.schedules import SCHEDULES
from phi3_jax.config.training import TrainingConfig
from phi3_jax.errors import UserError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
# Settings that are on in another program unless the file says otherwise.
_ON_ELSEWHERE = {
    "average_tokens_across_devices",
    "ignore_pad_token_for_loss",
    "shuffle_merged_datasets",
}
_TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


class Draft:
    """Collects the keys of a config.

    Args:
        raw: the other program's settings.

    Attributes:
        left: settings that nothing has been made of yet.
        sections: the config so far.
        notes: what was not taken over, and what means something else here.
    """

    def __init__(self, raw: Mapping[str, Any]):
        self.left = dict(raw)
        self.notes: list[str] = []
        self._values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections that have a key, and those that a config must have."""
        needed = ("model", "data", "training")
        return {name: keys for name, keys in self._values.items() if keys or name in needed}

    def take(self, name: str, default: Any = None) -> Any:
        """A setting's value, which is then dealt with; the default if it is missing or null."""
        value = self.left.pop(name, None)
        return default if value is None else value

    def put(self, key: str, value: Any) -> None:
        """Set `section.key`, unless the value is None."""
        if value is not None:
            section, _, name = key.partition(".")
            self._values[section][name] = value

    def get(self, key: str) -> Any:
        """The value that `section.key` has so far, or None."""
        section, _, name = key.partition(".")
        return self._values[section].get(name)

    def move(self, name: str, key: str, default: Any = None) -> None:
        """Take a setting over as it is."""
        self.put(key, self.take(name, default))

    def note(self, text: str) -> None:
        """Say something about a setting."""
        self.notes.append(text)

    def note_rest(self, name: str, rest: Mapping[str, Any]) -> None:
        """Note what is left of a setting that is a mapping."""
        for key, value in rest.items():
            if value is not None and value is not False:
                self.note(f"{name}: {key}: {_SHORT.repr(value)} was not taken over")

    def drop(self, key: str) -> None:
        """Unset `section.key`."""
        section, _, name = key.partition(".")
        self._values[section].pop(name, None)

    def finish(self) -> None:
        """Note every setting that is left and not off, or is off where its default is on."""
        for name, value in self.left.items():
            is_off = value is None or value in (False, "", [], {}, 0, "none", "no")
            if is_off and not (value is False and name in _ON_ELSEWHERE):
                continue
            known = {**NOT_APPLICABLE, **{k: v or "not available here" for k, v in MISSING.items()}}
            why = known.get(name)
            if why is None and name in OTHER_NAMES:
                why = f"set {OTHER_NAMES[name]} by hand"
            self.note(f"{name}: {_SHORT.repr(value)} was not taken over: {why or 'unknown here'}")
        self.left = {}


def arguments(draft: Draft, defaults: Mapping[str, Any]) -> None:
    """Take over what the file has of transformers' `TrainingArguments`.

    Args:
        draft: the draft.
        defaults: those of the other program that differ from the ones here.
    """
    if (old := draft.take("evaluation_strategy")) is not None:
        draft.left.setdefault("eval_strategy", old)
    own = ("learning_rate", "optim", "lr_scheduler_type", "report_to", "push_to_hub")
    for name in TrainingConfig.model_fields:
        if name in draft.left and name not in own:
            draft.move(name, f"training.{name}")
    _precision(draft)
    _schedule(draft)
    _trackers(draft)
    optimizer = draft.take("optim")
    if optimizer is not None and (problem := name_problem(str(optimizer))):
        draft.note(f"optim: {problem}; the config has adamw_torch")
    else:
        draft.put("training.optim", optimizer)
    draft.move("learning_rate", "training.learning_rate")
    if draft.take("group_by_length"):
        draft.put("training.train_sampling_strategy", "group_by_length")
    if draft.take("push_to_hub"):
        if draft.get("training.hub_model_id") is None:
            draft.note("push_to_hub: true was not taken over: it needs training.hub_model_id")
        else:
            draft.put("training.push_to_hub", True)
    for steps, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy")):
        if draft.get(f"training.{strategy}") not in (None, "steps"):
            draft.drop(f"training.{steps}")  # it has no effect there either
    for name, value in defaults.items():
        if draft.get(f"training.{name}") is None and not _is_moot(draft, name):
            draft.put(f"training.{name}", value)
    if "gradient_checkpointing_kwargs" in draft.left:
        draft.take("gradient_checkpointing_kwargs")
        draft.note("gradient_checkpointing_kwargs: not taken over: they are torch's")


def _is_moot(draft: Draft, name: str) -> bool:
    """Whether a default would have no effect, or an error, beside what the file says."""
    strategy = draft.get(f"training.{name.replace('steps', 'strategy')}")
    by_steps = draft.get("training.max_steps") not in (None, -1)
    return (name.endswith("_steps") and strategy not in (None, "steps")) or (
        name == "num_train_epochs" and by_steps
    )


def _precision(draft: Draft) -> None:
    asked = [draft.take(name) for name in ("bf16", "bfloat16", "pure_bf16")]
    if True in asked:
        draft.put("model.dtype", draft.get("model.dtype") or "bfloat16")
    if True in [draft.take(name) for name in ("fp16", "float16")]:
        draft.note(
            "fp16: true was not taken over: model.dtype auto is bfloat16 on a TPU or GPU, which "
            "needs no loss scaling"
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        draft.take(name)


def _schedule(draft: Draft) -> None:
    kind = draft.take("lr_scheduler_type")
    if kind is not None and kind not in SCHEDULES:
        draft.note(f"lr_scheduler_type: {kind!r} was not taken over: the config has linear")
        kind = None
    if kind == "constant":  # it ignores a warm-up there
        for name in ("warmup_steps", "warmup_ratio"):
            draft.drop(f"training.{name}")
    draft.put("training.lr_scheduler_type", kind)


def _trackers(draft: Draft) -> None:
    asked = draft.take("report_to")
    if asked is None:
        return
    asked = [asked] if isinstance(asked, str) else list(asked)
    found = ["tensorboard"] if "all" in asked else [name for name in asked if name in _TRACKERS]
    if others := [name for name in asked if name not in (*_TRACKERS, "none")]:
        draft.note(f"report_to: {', '.join(others)} was not taken over: {', '.join(_TRACKERS)} are")
    draft.put("training.report_to", found or ["none"])


def quantization(draft: Draft, double_quant: bool, kind: str) -> None:
    """Take over `load_in_4bit` and `load_in_8bit`."""
    four, eight = draft.take("load_in_4bit"), draft.take("load_in_8bit")
    if four:
        draft.put(
            "model.quantization",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": kind,
                "bnb_4bit_use_double_quant": double_quant,
            },
        )
    elif eight:
        draft.put("model.quantization", {"load_in_8bit": True})


def hold_out(
    draft: Draft, key: str, sources: list[dict[str, Any]], found: list[dict[str, Any]], split: str
) -> None:
    """Take over a data set of held-out rows: a split of the only source, or a path of its own.

    Args:
        draft: the draft.
        key: the other program's name of the setting.
        sources: the data sets to train on, with the keys of `data.sources`.
        found: those of held-out rows, likewise.
        split: the split of one that names none.
    """
    if not found:
        return
    if len(found) > 1:
        draft.note(f"{key}: only the first was taken over")
    own = {"split": split, "format": "auto"} | found[0]
    # How the rows are read here: a single source's format and columns hold for them, too.
    read = {"format": "auto"} | (sources[0] if len(sources) == 1 else {})
    draft.put("data.max_test_samples", own.get("max_samples"))
    if all(own.get(name) == read.get(name) for name in ("path", "name", "revision")):
        read["split"] = own["split"]
        draft.put("data.test_split", own["split"])
    else:
        read |= {"split": "train", "name": None, "revision": None}
        draft.put("data.test_path", own["path"])
    for name in ("name", "revision", "split", "format", "columns"):
        if (value := own.get(name)) != (used := read.get(name)):
            draft.note(
                f"{key}: {own['path']}: {name}: {_SHORT.repr(value)} was not taken over: held-out "
                f"rows are read with {_SHORT.repr(used)}"
            )


def names(value: Any) -> Any:
    """Module names: a list as it is, comma-separated text as a list, `all` as `all-linear`."""
    if not isinstance(value, str):
        return value
    if value in ("all", "all-linear"):
        return "all-linear"
    return [part.strip() for part in value.split(",") if part.strip()] if "," in value else value


def only_lora(is_lora: bool, said: str) -> None:
    """Raise UserError for a run that trains something else."""
    if not is_lora:
        raise UserError(f"{said}: only LoRA runs can be converted")
