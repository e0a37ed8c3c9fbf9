"""The documentation of the config keys."""

from __future__ import annotations

import pytest

from phi3_jax.config.describe import HEADER, describe_keys, type_name
from phi3_jax.config.run import SECTIONS
from tests.conftest import ROOT


def test_every_key_is_described_and_the_page_is_up_to_date():
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            assert field.description, f"{section}.{name}"
            assert f"- `{name}` (" in describe_keys()
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert page == f"{HEADER}\n{describe_keys()}\n", (
        "python -m phi3_jax.config.describe > docs/config.md"
    )


@pytest.mark.parametrize(
    "annotation, name",
    [
        (str | list[str] | None, "string or list of strings or null"),
        (dict[str, list[int]], "mapping from string to list of integers"),
        (bool, "true or false"),
        (list[list[float]], "list of lists of numbers"),
    ],
)
def test_types_by_name(annotation, name):
    assert type_name(annotation) == name
