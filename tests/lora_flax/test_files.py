"""Files are written whole or not at all."""

from __future__ import annotations

import pytest

import lora_flax


@pytest.mark.parametrize(
    ("content", "expected"),
    [("tée\n", "tée\n".encode()), (b"\x00\x01", b"\x00\x01"), ([b"a", b"bc"], b"abc")],
)
def test_content(tmp_path, content, expected):
    file = tmp_path / "file"
    file.write_bytes(b"old and longer than the new")
    lora_flax.write_atomically(file, content)
    assert file.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def pieces():
        yield b"new"
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        lora_flax.write_atomically(file, pieces())
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_order_of_sync_and_rename(tmp_path, monkeypatch):
    """The file is on disk before it gets its name, the name before the call returns."""
    calls = []
    monkeypatch.setattr("os.fsync", lambda descriptor: calls.append("sync"))
    replace = lora_flax.files.os.replace
    monkeypatch.setattr("os.replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    lora_flax.write_atomically(tmp_path / "file", "text")
    assert calls == ["sync", "rename", "sync"]
