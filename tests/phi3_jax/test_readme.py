"""The README's examples run as they are printed there."""

from __future__ import annotations

import json
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from phi3_jax.cli.main import main
from tests.conftest import ROOT


def block(language: str, containing: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    (found,) = [code for code in blocks if containing in code]
    return found


def test_lora_on_another_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(block("python", "nnx.Sequential"), "README.md", "exec"), scope)
    x, y, merge = scope["x"], scope["y"], scope["nnx"].merge
    without = jax.tree.map(jnp.zeros_like, scope["lora"])  # A B = 0: the model before training
    before = merge(scope["graphdef"], without, scope["frozen"])(x)
    assert np.mean((scope["model"](x) - y) ** 2) < 0.5 * np.mean((before - y) ** 2)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["r"] == 4
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


def test_training_on_your_own_data(checkpoint, tmp_path, monkeypatch):
    """The chats and the command of the README, on a tiny model in place of the quickstart's."""
    monkeypatch.chdir(tmp_path)
    text = block("bash", "chats.jsonl <<'END'")
    chats, command = re.fullmatch(
        r"cat > chats\.jsonl <<'END'\n(.*?)END\n(.*)", text, flags=re.DOTALL
    ).groups()  # type: ignore[union-attr]
    (tmp_path / "chats.jsonl").write_text(chats)
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    assert program == "phi3-jax"
    tiny = [f"model.path={checkpoint}", "mesh.data=1", "training.max_steps=2"]
    assert main([*arguments, *tiny]) == 0
    assert (tmp_path / "runs/pirate/adapter/adapter_model.safetensors").is_file()
