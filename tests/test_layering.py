"""Imports run one way, and the program needs neither torch nor pickle."""

from __future__ import annotations

import ast

import lora_flax
import phi3_jax
from tests.conftest import ROOT

FILES = sorted(
    [*ROOT.glob("phi3_jax/**/*.py"), *ROOT.glob("lora_flax/**/*.py"), *ROOT.glob("train.py")]
)
# The subpackages ("rooms") of each package and the rooms that they may import, besides themselves.
# `errors` is open to all rooms of its package. A module with a line of its own is a room by itself.
BASICS = {"compiler", "config", "sharding", "platform", "model", "buckets", "peaks"}
LIBRARY = {"checkpoint", "data", "generation", "quickstart"} | BASICS
PHI3_JAX: dict[str, set[str]] = {
    "errors": set(),
    "compiler": set(),
    "model": set(),
    "peaks": set(),
    "no_torch": set(),
    "sharding": {"model"},
    "config": {"model"},
    "platform": {"config", "model"},
    "configs": set(),
    "buckets": set(),
    "checkpoint": {"sharding", "model", "buckets", "platform"},
    "quickstart": {"checkpoint"} | BASICS,
    "data": {"no_torch", "buckets"} | BASICS,
    "generation": {"checkpoint", "data"} | BASICS,
    "evaluation": LIBRARY,
    "advice": {"data"} | BASICS,
    "report": set(),
    "training": {"report", "advice", "evaluation"} | LIBRARY,
    "export": {"generation", "checkpoint", "data", "model"},
    "planning": {"training", "advice", "evaluation"} | LIBRARY,
    "cli": {"planning", "training", "report", "advice", "export", "evaluation", "configs"}
    | {"no_torch"}
    | LIBRARY,
}
LORA_FLAX: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "host": set(),
    "axes": {"quant"},
    "expressions": set(),
    "config": {"expressions"},
    "layers.dropout": set(),
    "kernels": {"layers.dropout"},
    "layers": {"kernels", "layers.dropout", "config"},
    "targets.naming": set(),
    "index": {"layers", "targets.naming"},
    "quant": {"kernels", "layers", "index", "targets.naming", "host"},
    "fused_lora": {"kernels", "layers", "layers.dropout", "index", "targets.naming"},
    "trainable": {"index", "layers", "config", "targets.naming"},
    "optimizers": {"trainable", "index", "layers", "targets.naming"},
    "summary": {"trainable", "quant", "index", "layers", "targets.naming"},
    "targets": {"index", "layers", "config", "targets.naming"},
    "init": {"summary", "quant", "index", "layers", "config", "host"},
    "surgery": {"init", "targets", "summary", "trainable", "index", "layers", "config"}
    | {"targets.naming"},
    "peft": {"surgery", "init", "targets", "summary", "index", "layers", "config", "host", "files"}
    | {"targets.naming"},
}
LORA_FLAX_PUBLIC = {f"lora_flax.{name}" for name in lora_flax.__all__}
ROOMS = {"phi3_jax": PHI3_JAX, "lora_flax": LORA_FLAX}


def module_name(file) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: absolute imports only"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room(name: str) -> tuple[str, str]:
    """`phi3_jax.data.masks` as `("phi3_jax", "data")`; the package itself has the room ""."""
    package, _, rest = name.partition(".")
    rooms = [r for r in ROOMS.get(package, {}) if f"{rest}.".startswith(f"{r}.")]
    return package, max(rooms, key=len, default="")


def test_imports_run_one_way():
    problems = []
    for file in FILES:
        own_package, own = room(module_name(file))
        for name in sorted(imports(file)):
            package, other = room(name)
            if package not in ROOMS or own_package not in ROOMS or not own:
                continue  # other libraries; train.py and the packages' faces stand above all rooms
            if package != own_package:
                public = name == "lora_flax" or name in LORA_FLAX_PUBLIC
                allowed = own_package == "phi3_jax" and own != "model" and public
            elif not other:
                # The package's own face imports every room.
                allowed = own_package == "phi3_jax" and own in ("cli", "evaluation", "planning")
            else:
                allowed = other in ROOMS[package][own] | {own, "errors"}
            if not allowed:
                problems.append(f"{module_name(file)} imports {name}")
    assert not problems, "\n".join(problems)


def test_public_names_hide_no_module():
    """`lora_flax.x` is either a public name or a module, whatever was imported before."""
    for package in (lora_flax, phi3_jax):
        folder = ROOT / package.__name__
        modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        assert not modules & set(package.__all__), package.__name__


def test_no_torch_no_pickle():
    refused = {"torch", "peft", "loralib", "bitsandbytes", "trl", "pickle"}
    for file in FILES:
        roots = {name.split(".")[0] for name in imports(file)}
        assert not roots & refused, module_name(file)
