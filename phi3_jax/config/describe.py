"""The documentation of the config keys, generated from the sections that validate them.

`python -m phi3_jax.config.describe > docs/config.md` writes the page, and `phi3-jax train --help`
prints the same list.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from phi3_jax.config.run import SECTIONS

HEADER = """# Config keys

`phi3-jax train --config FILE [section.key=value ...]` reads a YAML file with the sections below.
Values on the command line are YAML too: `training.report_to=[tensorboard, wandb]`.

This page is generated from the code: `python -m phi3_jax.config.describe > docs/config.md`.
"""


def describe_keys() -> str:
    """Every key with its type, default and description, as Markdown that is readable unrendered."""
    lines = []
    for section, model in SECTIONS.items():
        lines += [f"## {section}", "", " ".join(str(model.__doc__).split()), ""]
        lines += [*_describe_fields(model), ""]
    return "\n".join(lines).rstrip()


def _describe_fields(model: type[BaseModel], indent: str = "") -> list[str]:
    lines = []
    required_first = sorted(model.model_fields.items(), key=lambda item: not item[1].is_required())
    for name, field in required_first:
        default = "required"
        if not field.is_required():
            default = f"default {_yaml(field.get_default(call_default_factory=True))}"
        kind = type_name(field.annotation)
        lines.append(f"{indent}- `{name}` ({kind}; {default}): {field.description}")
        for part in get_args(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                lines += _describe_fields(part, f"{indent}    ")
    return lines


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=1000)).split("\n")[0]


_NAMES = {str: "string", int: "integer", float: "number", bool: "true or false", type(None): "null"}


def type_name(annotation: Any, plural: bool = False) -> str:
    """A type as the page names it, such as `string or list of strings`."""
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_name(arguments[0], plural)
    if origin is Literal:
        return ", ".join(str(argument) for argument in arguments)
    if origin is list:
        return f"{'lists' if plural else 'list'} of {type_name(arguments[0], plural=True)}"
    if origin is dict:
        key, value = arguments
        return f"mapping from {type_name(key)} to {type_name(value)}"
    if arguments:
        return " or ".join(type_name(argument, plural) for argument in arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return _NAMES[annotation] + ("s" if plural else "")


if __name__ == "__main__":
    print(HEADER)
    print(describe_keys())
