"""Sections whose keys are the fields of a `lora_flax` dataclass.

The dataclass is the only place where these names, types, defaults and descriptions are written. A
section adds what only a run has: other defaults, ranges, and keys of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
from collections.abc import Callable, Collection, Mapping
from types import GenericAlias, NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field, create_model

Model = TypeVar("Model", bound=BaseModel)


def keys_of(
    source: type,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> Callable[[type[Model]], type[Model]]:
    """A class decorator that adds the fields of a dataclass to a section.

    Type checkers see only the keys written in the class: read the others through the method that
    builds the dataclass.

    Args:
        source: a dataclass that describes each field under `Attributes:` in its docstring.
        settings: arguments of pydantic's `Field`, by key; they replace those from the dataclass. A
            key with a `default` here cannot be null.
        notes: sentences to append to the descriptions, by key.
        without: fields that are not keys of the section.
    """
    settings, notes = settings or {}, notes or {}
    hints, described = get_type_hints(source), attribute_descriptions(source)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(source):
        name = field.name
        if name in without:
            continue
        own = settings.get(name, {})
        kind = yaml_type(hints[name], nullable="default" not in own)
        text = " ".join(filter(None, (described[name], notes.get(name))))
        fields[name] = (kind, Field(**{**_default(field), "description": text, **own}))

    def add(section: type[Model]) -> type[Model]:
        return create_model(
            section.__name__,
            __base__=section,
            __doc__=section.__doc__,
            __module__=section.__module__,
            **fields,
        )

    return add


def attribute_descriptions(source: type) -> dict[str, str]:
    """The entries under `Attributes:` in a Google-style class docstring, each as one sentence."""
    section = (inspect.getdoc(source) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    return {name: text[0].upper() + text[1:] for name, text in texts.items()}


def yaml_type(hint: Any, nullable: bool = True) -> Any:
    """The type in terms of what YAML has: lists for collections, dicts for mappings."""
    arguments = get_args(hint)
    if not arguments or get_origin(hint) is Literal:
        return hint
    parts = tuple(yaml_type(part) for part in arguments if part is not Ellipsis)
    origin = get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return GenericAlias(dict, parts)
    if isinstance(origin, type) and issubclass(origin, Collection):
        return GenericAlias(list, parts)
    return functools.reduce(operator.or_, (p for p in parts if nullable or p is not NoneType))


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.default_factory is not dataclasses.MISSING:
        return {"default_factory": field.default_factory}
    default = field.default
    return {"default": list(default) if isinstance(default, tuple) else default}
