"""Load a run config: a YAML file and `section.key=value` overrides in, a `RunConfig` out.

The keys are defined in phi3_jax/config/sections.py and data.py. All errors in a config are reported
at once, one line per key: its location, its value and what was expected.
"""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phi3_jax.config.data import DataConfig
from phi3_jax.config.foreign import suggestion
from phi3_jax.config.run import SECTIONS, RunConfig
from phi3_jax.config.sections import ModelConfig, PeftConfig, QuantizationConfig
from phi3_jax.config.shipped import find_config
from phi3_jax.config.training import TrainingConfig
from phi3_jax.config.yaml_text import parse_yaml
from phi3_jax.errors import UserError, at_most_ten

__all__ = [
    "DataConfig",
    "ModelConfig",
    "PeftConfig",
    "RunConfig",
    "TrainingConfig",
    "load_config",
]

OVERRIDE = "command line"

# Values in messages: a few aliases in a YAML file can stand for billions of items.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 200, 200


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML too).

    Args:
        path: a file, or the name of a config that ships with the package.
        overrides: as on the command line.

    Raises:
        UserError: all errors at once: unknown keys with the nearest known one, wrong types and
            ranges; or, if there are none of these, keys that contradict each other.
    """
    path = find_config(path)
    raw = _read_sections(path)
    overridden = set()
    problems = []
    for override in overrides:
        try:
            overridden.add(_apply(raw, override))
        except UserError as error:
            problems.append(f"{OVERRIDE}: {error}")
    for key, problem in problems_of(raw):
        problems.append(f"{OVERRIDE if key in overridden else path}: {key}: {problem}")
    if problems:
        raise UserError("\n".join(at_most_ten(problems)))
    return RunConfig.model_validate(raw)


def problems_of(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with a config as YAML has it, by key; empty if it is valid."""
    try:
        RunConfig.model_validate(raw)
    except ValidationError as error:
        return _explain(error)
    return []


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        UserError: it does not exist, cannot be read, or is not YAML.
    """
    if os.path.exists(path) and not path.is_file():  # a FIFO would never end
        raise UserError(f"{path}: not a regular file")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _read_sections(path: Path) -> dict[str, Any]:
    """The file's mapping with every section present, empty if the file omits it."""
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected the sections {', '.join(SECTIONS)}, not {_shown(raw)}")
    return raw | {name: {} if raw.get(name) is None else raw[name] for name in SECTIONS}


def _apply(raw: dict[str, Any], override: str) -> str:
    """Apply one override to the mapping and return its key."""
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise UserError(f"{override!r} is not of the form section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError:
        raise UserError(f"{key}: {_shown(text)} is not valid YAML; put it in quotes") from None
    values = raw.setdefault(section, {})
    if isinstance(values, dict):  # otherwise the file is wrong there, and validation reports it
        values[name] = value
    return key


def _explain(error: ValidationError) -> list[tuple[str, str]]:
    """Pydantic's errors as (key, problem), one per key."""
    wanted: dict[str, list[str]] = {}
    problems: dict[str, str] = {}
    for item in error.errors():
        # Union members and list positions follow the key; the key is enough.
        key = ".".join(str(part) for part in item["loc"][:2])
        if item["type"] == "extra_forbidden" and len(item["loc"]) > 2:
            name = str(item["loc"][-1])
            hint = suggestion(name) or "docs/config.md lists its keys"
            problems[key] = f"unknown key {name}; {hint}"
        elif item["type"] in ("extra_forbidden", "invalid_key"):  # the latter is a number
            problems[key] = f"unknown key; {_nearest(key)}"
        elif item["type"] == "missing" and len(item["loc"]) > 2:
            problems[key] = f"{item['loc'][-1]} is missing in one of them"
        elif item["type"] == "missing":
            problems[key] = f"missing; {_description(key)}"
        elif item["type"] == "value_error" and item["loc"]:  # from a key's own check
            problems[key] = str(item["ctx"]["error"])
        elif item["type"] == "value_error":  # from `RunConfig`'s cross-checks
            return [
                (key, rest)
                for key, _, rest in (
                    line.partition(": ") for line in str(item["ctx"]["error"]).splitlines()
                )
            ]
        elif item["type"] == "model_type":
            problems[key] = f"{_shown(item['input'])} should be a mapping of keys to values"
        else:
            # "Input should be a valid integer", "String should have at least 1 character".
            subject, should, rest = item["msg"].partition(" should ")
            wanted.setdefault(key, []).append(rest if should else f"be {subject}")
            others = [text.removeprefix("be ") for text in wanted[key][1:]]
            said = " or ".join([wanted[key][0], *others])
            problems[key] = f"{_shown(item['input'])} should {said}"
    return list(problems.items())


def _description(key: str) -> str:
    section, name = key.split(".")
    return str(SECTIONS[section].model_fields[name].description)


def _nearest(key: str) -> str:
    """A suggestion for an unknown key, or the list of valid ones."""
    section, dot, name = key.partition(".")
    name = name if dot else section
    everywhere = [f"{s}.{n}" for s, model in SECTIONS.items() for n in model.model_fields]
    everywhere += [f"model.quantization.{n}" for n in QuantizationConfig.model_fields]
    # Prefer a known name in the wrong section, or in none, and a name that another program has for
    # a key, over a similar name in this section.
    moved = [other for other in everywhere if other.rpartition(".")[2] == name]
    if moved:
        return f"did you mean {moved[0]}?"
    if (meant := suggestion(name)) is not None:
        return meant
    here = list(SECTIONS[section].model_fields) if dot and section in SECTIONS else list(SECTIONS)
    if close := difflib.get_close_matches(name, here, n=1, cutoff=0.6):
        return f"did you mean {f'{section}.{close[0]}' if dot else close[0]}?"
    return f"valid keys: {', '.join(here)}"


def _shown(value: object) -> str:
    """A value as it appears in a message, cut if it is long."""
    return _SHORT.repr(value)
