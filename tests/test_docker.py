"""The Dockerfile against pyproject.toml and the tree; there is no Docker where the tests run."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.conftest import ROOT

LINES = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by its name."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for line in LINES:
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            found[rest.split(" AS ")[1]] = []
        if instruction and not instruction.startswith("#"):
            found[list(found)[-1]].append((instruction, rest))
    return found


STAGES = stages()
TARGETS = [name for name, lines in STAGES.items() if ("FROM", f"base AS {name}") in lines]


def test_targets_and_their_base():
    assert sorted(TARGETS) == ["cpu", "gpu", "tpu"]
    assert list(STAGES)[-1] == "cpu"  # what `docker build .` makes
    (version,) = [rest.partition("=")[2] for kind, rest in STAGES[""] if kind == "ARG"]
    assert re.fullmatch(r"3\.\d+\.\d+", version), "the base is not pinned"
    lowest = re.search(r"3\.(\d+)", PROJECT["requires-python"])
    assert int(version.split(".")[1]) >= int(lowest[1])


@pytest.mark.parametrize("name", TARGETS)
def test_extras_exist_and_the_user_is_not_root(name):
    text = " ".join(rest for kind, rest in STAGES[name] if kind == "RUN")
    extras = re.search(r"\.whl\)\[([\w,-]+)\]", text)[1].split(",")
    assert not set(extras) - set(PROJECT["optional-dependencies"])
    assert STAGES[name][-1] == ("USER", "phi3")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for pin in re.findall(r"[\w-]+==[\w.]+", text):
        assert pin in readme


def test_the_command_is_installed():
    assert ("ENTRYPOINT", '["phi3-jax"]') in STAGES["base"]
    assert "phi3-jax" in PROJECT["scripts"]


def test_what_is_copied_is_there_and_not_ignored():
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        name for kind, rest in STAGES["wheel"] if kind == "COPY" for name in rest.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    # Everything that setuptools needs to build the wheel.
    assert {PROJECT["readme"], "pyproject.toml", "LICENSE"} <= copied
