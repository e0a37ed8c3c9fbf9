"""The config files of each checkpoint, LoRA and QLoRA, are valid and name it."""

from __future__ import annotations

import pytest

from phi3_jax.config.loader import load_config
from tests.conftest import CONFIGS, ROOT

CHECKPOINTS = {file.stem for file in (ROOT / "tests/fixtures/checkpoints").glob("*.json")}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("phi*lora.yaml")), ids=lambda f: f.stem)
def test_valid(file):
    config = load_config(file)
    assert config.model.path.removeprefix("microsoft/") in CHECKPOINTS
    assert config.training.output_dir == f"runs/{file.stem.removesuffix('_lora')}"
    assert (config.model.bitsandbytes is not None) == file.stem.endswith("_qlora")


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_one_for_each(kind):
    named = {
        load_config(file).model.path.removeprefix("microsoft/")
        for file in CONFIGS.glob(f"phi*_{kind}.yaml")
    }
    assert named == {name for name in CHECKPOINTS if not name.endswith("-su")}
