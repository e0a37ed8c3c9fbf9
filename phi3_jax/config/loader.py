"""Load a run config: a YAML file and `section.key=value` overrides in, a `RunConfig` out.

The keys are defined in phi3_jax/config/sections.py and data.py. All errors in a config are reported
at once, one line per key: its location, its value and what was expected.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from phi3_jax.config.data import DataConfig
from phi3_jax.config.run import SECTIONS, RunConfig
from phi3_jax.config.sections import ModelConfig, PeftConfig, TrainingConfig
from phi3_jax.config.shipped import find_config
from phi3_jax.errors import UserError

__all__ = [
    "DataConfig",
    "ModelConfig",
    "PeftConfig",
    "RunConfig",
    "TrainingConfig",
    "load_config",
]

OVERRIDE = "command line"


class _Loader(yaml.SafeLoader):
    """Safe YAML that parses `1e-4` as a number and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the base class reports the error
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 requires a decimal point and an exponent sign: 1e-4 and 1.5e5 would be strings.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


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
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        for key, problem in _explain(error):
            problems.append(f"{OVERRIDE if key in overridden else path}: {key}: {problem}")
    if problems:
        raise UserError("\n".join(problems))
    return config


def _read_sections(path: Path) -> dict[str, Any]:
    """The file's mapping with every section present, empty if the file omits it."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a safe loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected the sections {', '.join(SECTIONS)}, not {raw!r}")
    return raw | {name: {} if raw.get(name) is None else raw[name] for name in SECTIONS}


def _apply(raw: dict[str, Any], override: str) -> str:
    """Apply one override to the mapping and return its key."""
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise UserError(f"{override!r} is not of the form section.key=value")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a safe loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{key}: {text!r} is not valid YAML; put it in quotes") from None
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
            problems[key] = f"unknown key {item['loc'][-1]}; docs/config.md lists its keys"
        elif item["type"] == "extra_forbidden":
            problems[key] = f"unknown key; {_nearest(key)}"
        elif item["type"] == "missing" and len(item["loc"]) > 2:
            problems[key] = f"{item['loc'][-1]} is missing in one of them"
        elif item["type"] == "missing":
            problems[key] = f"missing; {_description(key)}"
        elif item["type"] == "value_error":  # from `RunConfig`'s cross-checks
            return [
                (key, rest)
                for key, _, rest in (
                    line.partition(": ") for line in str(item["ctx"]["error"]).splitlines()
                )
            ]
        elif item["type"] == "model_type":
            problems[key] = f"{item['input']!r} should be a mapping of keys to values"
        else:
            wanted.setdefault(key, []).append(item["msg"].removeprefix("Input should be "))
            problems[key] = f"{item['input']!r} should be {' or '.join(wanted[key])}"
    return list(problems.items())


def _description(key: str) -> str:
    section, name = key.split(".")
    return str(SECTIONS[section].model_fields[name].description)


def _nearest(key: str) -> str:
    """A suggestion for an unknown key, or the list of valid ones."""
    section, dot, name = key.partition(".")
    everywhere = [f"{s}.{n}" for s, model in SECTIONS.items() for n in model.model_fields]
    # Prefer a known name in the wrong section, or in none, over another name in this section.
    moved = [other for other in everywhere if other.split(".")[1] == (name or section)]
    here = list(SECTIONS[section].model_fields) if dot and section in SECTIONS else list(SECTIONS)
    close = difflib.get_close_matches(name or section, here, n=1, cutoff=0.6)
    if moved or close:
        return (
            f"did you mean {moved[0] if moved else f'{section}.{close[0]}' if dot else close[0]}?"
        )
    return f"valid keys: {', '.join(here)}"
