"""Finding a model: a folder, or a hub id."""

from __future__ import annotations

import pytest

import phi3_jax
from phi3_jax import UserError
from phi3_jax.checkpoint import hub


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
