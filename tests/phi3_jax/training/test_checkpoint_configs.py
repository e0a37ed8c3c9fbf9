"""The config files of each checkpoint, LoRA and QLoRA, are valid and name it."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_jax.training.config import load_config

ROOT = Path(__file__).parents[3]
CHECKPOINTS = {file.stem for file in (ROOT / "tests/fixtures/checkpoints").glob("*.json")}


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/phi*lora.yaml")), ids=lambda f: f.stem)
def test_valid(file):
    config = load_config(file)
    assert config.model.path.removeprefix("microsoft/") in CHECKPOINTS
    assert config.training.output_dir == f"runs/{file.stem.removesuffix('_lora')}"
    assert (config.model.bitsandbytes is not None) == file.stem.endswith("_qlora")


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_one_for_each(kind):
    named = {
        load_config(file).model.path.removeprefix("microsoft/")
        for file in ROOT.glob(f"configs/phi*_{kind}.yaml")
    }
    assert named == {name for name in CHECKPOINTS if not name.endswith("-su")}
