"""The API reference lists every public name; `mkdocs build --strict` checks all else."""

from __future__ import annotations

import re

import pytest

import lora_flax
import phi3_jax
from tests.conftest import ROOT


@pytest.mark.parametrize("package", [lora_flax, phi3_jax], ids=lambda package: package.__name__)
def test_api_reference_is_complete(package):
    name = package.__name__
    page = (ROOT / f"docs/api/{name}.md").read_text(encoding="utf-8")
    assert sorted(re.findall(rf"^::: {name}\.(\w+)$", page, re.MULTILINE)) == sorted(
        package.__all__
    )
