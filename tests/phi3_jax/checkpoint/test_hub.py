"""Finding a model: a folder, or a hub id."""

from __future__ import annotations

import json

import pytest

import phi3_jax
from phi3_jax import UserError
from phi3_jax.checkpoint import hub
from phi3_jax.checkpoint.adapters import open_with_adapter
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.config.loader import RunConfig
from phi3_jax.training.setup import continued_adapter


def test_no_such_folder_and_no_such_repo(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        phi3_jax.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="no-such/model: no such folder, and not available"):
        phi3_jax.load("no-such/model")


def test_hub_download_takes_no_code_and_no_pickle(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.resolve("microsoft/Phi-3-mini-4k-instruct", "abc") == tmp_path
    assert asked["revision"] == "abc"
    assert not [p for p in asked["patterns"] if p.endswith((".py", ".bin", ".pt", "*"))]


def test_revisions_of_an_adapter_and_of_its_base(tmp_path, monkeypatch):
    """`peft.adapter_revision`, and the base at the revision that the adapter names."""
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    for folder in (adapter, base):
        folder.mkdir()
    fields = {"base_model_name_or_path": "user/base", "revision": "v2"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    asked, opened = [], []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str({"user/adapter": adapter, "user/base": base}[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(Checkpoint, "open", lambda *names: opened.append(names))
    raw = {"model": {"path": "m"}, "data": {"path": "d"}, "training": {"output_dir": "o"}}
    raw["peft"] = {"adapter_name_or_path": "user/adapter", "adapter_revision": "v1"}
    assert continued_adapter(RunConfig.model_validate(raw)) == adapter
    assert asked == [("user/adapter", "v1")]
    # As --model and --adapter; another base has its own revisions.
    open_with_adapter(str(adapter), None)
    open_with_adapter("user/base", str(adapter))
    open_with_adapter("user/other", str(adapter))
    assert opened == [("user/base", "v2"), ("user/base", "v2"), ("user/other", None)]
