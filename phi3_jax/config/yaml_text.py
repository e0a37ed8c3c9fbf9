"""YAML as people expect it: the types of YAML 1.2, no tags, no duplicate keys.

PyYAML follows YAML 1.1, where `no` is false, `010` is eight, `1:30` is ninety, `2024-01-01` is a
date and `1e-4` is a string.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any, cast

import yaml

# More digits than any number of a config has; Python refuses to parse 4,300.
_MAX_DIGITS = 100

_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"

# The core schema (YAML 1.2.2, section 10.3.2) with the characters that each form begins with.
_FORMS = [
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    (_MERGE, r"<<", ["<"]),
]


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's types."""

    # Not the base class's, whose table has the types of YAML 1.1.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = cast("Any", self).peek_event()  # types-PyYAML has no types for it
        tag = (getattr(event, "tag", None) or "!").replace("tag:yaml.org,2002:", "!!")
        if tag != "!":
            raise yaml.constructor.ConstructorError(
                None, None, f"tags such as {tag} are not supported", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
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

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = node.value
        if len(text) > _MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"an integer of {len(text)} digits", node.start_mark
            )
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text.removeprefix("0o"), base)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = node.value.lower()
        if text.endswith((".inf", ".nan")):
            return math.copysign(float(text[-3:]), -1 if text[0] == "-" else 1)
        return float(text)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that either version of YAML would read as something else."""


for _tag, _form, _first in _FORMS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_form})$"), _first)
_Loader.add_constructor(_INT, _Loader.construct_int)
_Loader.add_constructor(_FLOAT, _Loader.construct_float)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        ValueError: not YAML, with the line and column on one line; also a tag, a duplicate key, an
            integer of over 100 digits, or a document that is nested too deeply.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{where}{problem}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dump_yaml(value: dict[str, Any]) -> str:
    """Write a mapping of plain values so that any YAML reader gives it back, in the same order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
