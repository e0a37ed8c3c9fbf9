"""Imports run one way, and the program needs neither torch nor pickle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    [*ROOT.glob("phi3_jax/**/*.py"), *ROOT.glob("lora_flax/**/*.py"), *ROOT.glob("train.py")]
)
# Lower may not import higher. The model files know none of the rest.
LAYERS = {
    "lora_flax": 0,
    "phi3_jax": 1,
    "phi3_jax.data": 2,
    "phi3_jax.base": 2,
    "phi3_jax.export": 2,
    "phi3_jax.training": 3,
    "phi3_jax.evaluation": 4,
    "phi3_jax.plan": 4,
    "phi3_jax.plan_report": 4,
    "phi3_jax.harness": 4,
    "phi3_jax.cli": 5,
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: absolute imports only"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def package(name: str) -> str | None:
    """The layer that a dotted module name belongs to."""
    fitting = [p for p in LAYERS if name == p or name.startswith(p + ".")]
    return max(fitting, key=len, default=None)


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_run_one_way(file):
    own = package(module_name(file))
    if own is None:
        return  # train.py stands above all
    for name in imports(file):
        other = package(name)
        if other is None:
            continue
        assert LAYERS[other] <= LAYERS[own], f"{file.name} imports {name}"
        if own == "phi3_jax" or other == "lora_flax" and own == "phi3_jax.data":
            assert other == own, f"{file.name} imports {name}: the network knows nothing of it"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_no_torch_no_pickle(file):
    roots = {name.split(".")[0] for name in imports(file)}
    assert not roots & {"torch", "peft", "loralib", "bitsandbytes", "trl", "pickle"}
