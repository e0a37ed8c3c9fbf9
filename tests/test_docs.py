"""The docs name code that exists; `mkdocs build --strict` checks their links and docstrings."""

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


def test_architecture_names_what_exists():
    """Each "`name` (`file`)" is defined there, and the tree lists every subpackage and module."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`\s+\(`([\w/]+\.py)`\)", page)
    assert len(named) > 20
    for name, file in named:
        path = ROOT / file if file.startswith("lora_flax/") else ROOT / "phi3_jax" / file
        assert path.is_file(), f"docs/architecture.md names {file}, which does not exist"
        defined = re.search(rf"^(def|class) {name}\b", path.read_text("utf-8"), re.MULTILINE)
        assert defined, f"docs/architecture.md places {name} in {file}"
    tree = page.split("```")[1]
    for package in ("lora_flax", "phi3_jax"):
        listed = tree.split(f"{package}/\n")[1].split("\nphi3_jax/")[0]
        entries = set(re.findall(r"(?:^|\s)([\w]+/|\w+\.py)(?=\s)", listed, re.MULTILINE))
        here = {p.name + "/" for p in (ROOT / package).iterdir() if any(p.glob("*.py"))}
        here |= {p.name for p in (ROOT / package).glob("*.py")} - {"__init__.py", "errors.py"}
        assert entries == here


def test_paths_in_the_docs_exist():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    pages.remove(ROOT / "CHANGELOG.md")  # describes the past
    folders = "lora_flax|phi3_jax|tests|docs|benchmarks|scripts"
    for page in pages:
        for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text(encoding="utf-8")):
            assert "NAME" in path or (ROOT / path).exists(), f"{page.name}: no {path}"
