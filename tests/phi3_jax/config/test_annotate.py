"""The comments of `phi3-jax init` change nothing but the comments."""

from __future__ import annotations

import pytest

from phi3_jax.config.annotate import COLUMNS, annotate
from phi3_jax.config.loader import load_config
from phi3_jax.config.shipped import FOLDER, shipped_names


@pytest.mark.parametrize("name", shipped_names())
def test_every_key_is_explained_and_none_is_changed(name, tmp_path):
    source = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    text = annotate(source)
    file = tmp_path / "annotated.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_config(file) == load_config(name)
    assert [line for line in source.splitlines() if "#" in line] == [
        line for line in text.splitlines() if line in source.splitlines() and "#" in line
    ]
    lines = text.splitlines()
    assert all(len(line) <= COLUMNS for line in lines if line not in source.splitlines())
    for before, line in zip(lines, lines[1:], strict=False):
        if line.startswith("  ") and line[2].isalpha():
            assert " # " in line or before.lstrip().startswith("# "), line
    assert annotate(text) == text
