"""YAML 1.2's types, one-line errors, and files that every YAML reader gives back."""

from __future__ import annotations

import math

import pytest
import yaml

from phi3_jax.config.yaml_text import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("off", "off"),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("2024-13-01", "2024-13-01"),
        ("1e-4", 1e-4),
        ("5e3", 5000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("+7", 7),
        ("TRUE", True),
        ("~", None),
        ("", None),
        ("{<<: {b: 1}, c: 2}", {"b": 1, "c": 2}),
    ],
)
def test_types(text, value):
    """The core schema of YAML 1.2.2, section 10.3.2, and merge keys."""
    parsed = parse_yaml(f"a: {text}")["a"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!str 5", "line 1, column 4: tags such as !!str are not supported"),
        ("a: !!python/object:os.system x", "tags such as !!python/object:os.system are"),
        ("a: 1\na: 2", "line 2, column 1: duplicate key 'a'"),
        ("a: " + "9" * 5000, "line 1, column 4: an integer of 5000 digits"),
        ("[" * 20_000, "nested too deeply"),
        ("- " * 20_000, "nested too deeply"),
        ("a: \x01", "special characters are not allowed"),
        ("a: [", "line 1, column 5: "),
        ("a: 1\n---\nb: 2", "line 2, column 1: "),
        ("? [1]\n: 2", "line 1, column 3: "),
        ("*x", "undefined alias 'x'"),
    ],
)
def test_errors_are_one_line(text, message):
    with pytest.raises(ValueError) as error:
        parse_yaml(text)
    assert message in str(error.value) and "\n" not in str(error.value)


STRINGS = "no 010 0o17 0x1f 1:30 1_000 2024-01-01 1e5 .5 ~ null yes True << = !x &x é\x07".split(
    " "
)


@pytest.mark.parametrize("value", [*STRINGS, "", "a\nb", 1e-8, 1e22, -math.inf, 10**20, None, [1]])
def test_a_dump_is_read_back_by_either_version(value):
    text = dump_yaml({"b": value, "a": 1})
    assert parse_yaml(text) == yaml.safe_load(text) == {"b": value, "a": 1}
    assert list(parse_yaml(text)) == ["b", "a"]
