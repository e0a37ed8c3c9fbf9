"""Sections derived from `lora_flax` dataclasses: one place for names, types and descriptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal

import pytest
from pydantic import ValidationError

from lora_flax import BitsAndBytesConfig, LoraConfig
from phi3_jax.config.derived import attribute_descriptions, keys_of, yaml_type
from phi3_jax.config.sections import PeftConfig, QuantizationConfig, Section


@dataclasses.dataclass(frozen=True)
class Source:
    """What to do.

    Attributes:
        size: how much,
            in pieces: `a: b`.
        names: which ones.
        kind: of a kind.

    Raises:
        ValueError: never.
    """

    size: int = 1
    names: Collection[str] | None = ("a",)
    kind: Literal["x", "y"] = "x"


@keys_of(Source, settings={"names": {"default": ["b"]}}, notes={"kind": "More."}, without={"size"})
class Derived(Section):
    """A section."""

    own: int = 3

    def to_source(self) -> Source:
        return Source(**self.model_dump(exclude={"own"}))


def test_names_types_defaults_and_descriptions():
    assert attribute_descriptions(Source)["size"] == "How much, in pieces: `a: b`."
    assert list(Derived.model_fields) == ["own", "names", "kind"]
    assert Derived.model_fields["kind"].description == "Of a kind. More."
    assert (Derived.__name__, Derived.__doc__) == ("Derived", "A section.")
    assert Derived(kind="y").to_source() == Source(names=["b"], kind="y")


@pytest.mark.parametrize(
    "wrong", [{"names": None}, {"names": ("a",)}, {"names": "a"}, {"kind": "z"}, {"size": 1}]
)
def test_a_derived_key_is_strict(wrong):
    with pytest.raises(ValidationError):
        Derived(**wrong)


@pytest.mark.parametrize(
    "hint, expected",
    [
        (int, int),
        (tuple[str, ...], list[str]),
        (int | Collection[int] | None, int | list[int] | None),
        (Mapping[str, Collection[int]], dict[str, list[int]]),
        (Literal["a", "b"] | None, Literal["a", "b"] | None),
    ],
)
def test_types_that_yaml_has(hint, expected):
    assert yaml_type(hint) == expected


def test_each_field_of_lora_config_is_a_key_with_its_default():
    own = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
    assert PeftConfig().to_lora() == LoraConfig(**own)
    keys = {field.name for field in dataclasses.fields(LoraConfig)} - {"fan_in_fan_out"}
    own = {"adapter_name_or_path", "adapter_revision", "keep_rslora"}
    assert keys == PeftConfig.model_fields.keys() - own
    assert attribute_descriptions(LoraConfig).keys() == keys | {"fan_in_fan_out"}


def test_each_field_of_bits_and_bytes_config_is_a_key_with_its_default():
    section = QuantizationConfig(load_in_4bit=True)
    assert section.to_bitsandbytes() == BitsAndBytesConfig(load_in_4bit=True)
    keys = [field.name for field in dataclasses.fields(BitsAndBytesConfig)]
    assert list(QuantizationConfig.model_fields) == keys
