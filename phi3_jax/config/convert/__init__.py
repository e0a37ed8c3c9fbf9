"""Configs of LoRA runs of TRL, LLaMA-Factory and Axolotl, as configs of this program.

What a file does not say has the other program's default, where that differs from the one here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi3_jax.config.convert.axolotl import from_axolotl
from phi3_jax.config.convert.draft import Draft
from phi3_jax.config.convert.llama_factory import from_llama_factory
from phi3_jax.config.convert.trl import from_trl
from phi3_jax.config.loader import problems_of, read_yaml
from phi3_jax.config.run import SECTIONS
from phi3_jax.config.yaml_text import dump_yaml
from phi3_jax.errors import UserError

# The first program of which a file has one of these keys.
_SIGNS: dict[str, tuple[Callable[[Draft, Path], None], set[str]]] = {
    "Axolotl": (from_axolotl, {"base_model", "micro_batch_size", "sequence_len", "val_set_size"}),
    "LLaMA-Factory": (
        from_llama_factory,
        {"finetuning_type", "stage", "cutoff_len", "lora_rank", "lora_target", "template"},
    ),
    "TRL": (from_trl, {"model_name_or_path", "dataset_name", "use_peft", "lora_target_modules"}),
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted config.

    Attributes:
        program: whose file it was.
        text: the config, as YAML.
        notes: what was not taken over, and what means something else here; one line each.
        problems: what keeps the config from being used; empty if it is valid.
    """

    program: str
    text: str
    notes: list[str]
    problems: list[str]


def convert(path: Path) -> Converted:
    """Convert a file.

    Raises:
        UserError: it cannot be read, is not a config of these programs, or not one of a LoRA run.
    """
    raw = _read(path)
    if raw.keys() <= SECTIONS.keys():
        raise UserError(f"{path} is a config of this program already")
    for program, (read, signs) in _SIGNS.items():
        if signs & raw.keys():
            draft = Draft(raw)
            try:
                read(draft, path)
            except (TypeError, ValueError, AttributeError) as error:
                if isinstance(error, UserError):
                    raise UserError(f"{path}: {error}") from None
                raise UserError(f"{path}: a value is not what {program} takes: {error}") from error
            draft.finish()
            sections = draft.sections
            problems = [f"{key}: {problem}" for key, problem in problems_of(sections)]
            try:
                text = dump_yaml(sections)
            except RecursionError:
                raise UserError(f"{path}: nested too deeply") from None
            return Converted(program, text, draft.notes, problems)
    wanted = "; ".join(f"{name}: {', '.join(sorted(s))}" for name, (_, s) in _SIGNS.items())
    raise UserError(f"{path}: not a config of TRL, LLaMA-Factory or Axolotl, which have {wanted}")


def _read(path: Path) -> dict[str, Any]:
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise UserError(f"{path}: expected a mapping of settings")
    return raw
