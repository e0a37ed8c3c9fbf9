"""What a stream gives: its sources by weight, and neither bad rows nor held-out ones."""

from __future__ import annotations

import contextlib
import itertools
import json

import fsspec
import pytest

from phi3_jax import UserError
from phi3_jax.data.loading import load_data
from phi3_jax.data.tokenizer import load_tokenizer
from tests.phi3_jax.conftest import TOKENIZER
from tests.phi3_jax.data.streams import batches_of, config, lines, put, texts, words


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def test_sources_are_mixed_by_weight(tmp_path, tokenizer):
    put(tmp_path, "a.jsonl", texts("a", 5))
    put(tmp_path, "b.jsonl", [{"body": f"b {i}"} for i in range(9)])
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "weight": 3},
        {"path": str(tmp_path / "b.jsonl"), "columns": {"text": "body"}},
    ]
    with contextlib.closing(batches_of(config(tmp_path, sources=sources), tokenizer)) as batches:
        for first in (0, 2, 4):  # a block of eight rows is two steps of four
            found = [
                word for step in (first, first + 1) for word in words(batches[step], tokenizer)
            ]
            assert (sum("a " in w for w in found), sum("b " in w for w in found)) == (6, 2)
            counts = [batches.counts(step) for step in (first, first + 1)]
            assert sum(c.get("examples/a.jsonl", 0) for c in counts) == 6


def test_a_held_out_row_is_never_trained_on(tmp_path, tokenizer):
    """Wherever it is: by its tokens."""
    put(tmp_path, "a.jsonl", [*texts("a", 6), {"text": "secret"}, *texts("b", 5)])
    put(tmp_path, "held.csv", [{"text": "secret"}, {"text": "a 2"}])
    data = config(tmp_path, path=str(tmp_path / "a.jsonl"), test_path=str(tmp_path / "held.csv"))
    _, test = load_data(data, tokenizer)
    assert len(test.examples) == 2
    with contextlib.closing(batches_of(data, tokenizer)) as batches:
        found = {word for step in range(5) for word in words(batches[step], tokenizer)}
        assert batches.counts(4)["held_out_rows"] >= 4
    assert found == {f"a {i}" for i in (0, 1, 3, 4, 5)} | {f"b {i}" for i in range(5)}


@pytest.mark.parametrize("where", ["the folder", "a copy", "a bucket"])
def test_a_held_out_file_is_never_trained_on(tmp_path, tokenizer, where):
    """Nor those of its rows that are not evaluated, however many they are."""
    folder, files = tmp_path / "d", fsspec.filesystem("memory")
    folder.mkdir()
    put(folder, "a.jsonl", texts("a", 9))
    put(folder, "b.jsonl", texts("b", 200))
    put(tmp_path, "copy.jsonl", texts("b", 200))
    for file in folder.iterdir():
        files.pipe(f"/held/{file.name}", file.read_bytes())
    path = "memory://held" if where == "a bucket" else str(folder)
    held = folder / "b.jsonl" if where == "the folder" else tmp_path / "copy.jsonl"
    own = {"path": path, "test_path": str(held), "max_test_samples": 3}
    with contextlib.closing(batches_of(config(tmp_path, **own), tokenizer)) as batches:
        found = {word for step in range(4) for word in words(batches[step], tokenizer)}
    assert found == {f"a {i}" for i in range(9)}
    own["path"] = f"{path}/b.jsonl"
    with pytest.raises(UserError, match="data.test_path holds out every file of it"):
        load_data(config(tmp_path, **own), tokenizer)
    files.rm("/held", recursive=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_rows_decide_what_a_stream_gives(tmp_path, tokenizer, streaming):
    """Which of them it has, only reading all of it would tell."""
    put(tmp_path, "a.jsonl", texts("a", 4))
    put(tmp_path, "held.csv", texts("b", 2))
    own = {"path": str(tmp_path / "a.jsonl"), "test_path": str(tmp_path / "held.csv")}
    own |= {"streaming": streaming, "shuffle_buffer_size": 8 if streaming else 10_000}
    found = {
        load_data(config(tmp_path, **own, max_test_samples=count), tokenizer)[0].fingerprint()
        for count in (1, 2)
    }
    assert len(found) == (2 if streaming else 1)


@pytest.mark.parametrize("kind", ["held out", "bad"])
def test_examples_are_found_after_many_rows_without_any(tmp_path, tokenizer, kind):
    rows = lines(texts("a", 3) + texts("b", 40) + texts("a", 3))
    own = {"path": str(tmp_path / "a.jsonl"), "shuffle_buffer_size": 1, "on_bad_row": "skip"}
    if kind == "bad":
        rows = rows.replace(b'{"text": "b', b'{"test": "b')
    else:
        put(tmp_path, "held.csv", texts("b", 40))
        own["test_path"] = str(tmp_path / "held.csv")
    (tmp_path / "a.jsonl").write_bytes(rows)
    with contextlib.closing(batches_of(config(tmp_path, **own), tokenizer)) as batches:
        found = [word for step in range(3) for word in words(batches[step], tokenizer)]
    assert found == [f"a {i}" for i in (0, 1, 2, 0, 1, 2) * 2]


def test_blocks_smaller_than_the_number_of_sources(tmp_path, tokenizer):
    for name in "abcd":
        put(tmp_path, f"{name}.jsonl", texts(name, 5))
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in "abcd"]
    data = config(tmp_path, sources=sources, shuffle_buffer_size=1)
    with contextlib.closing(batches_of(data, tokenizer)) as batches:
        assert sorted(words(batches[0], tokenizer)) == ["a 0", "b 0", "c 0", "d 0"]


def test_bad_rows(tmp_path, tokenizer):
    rows = lines(texts("a", 20)).split(b"\n")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*rows[:10], b"{broken", *rows[10:]]))
    data = config(tmp_path, path=str(tmp_path / "a.jsonl"))
    with contextlib.closing(batches_of(data, tokenizer)) as batches:
        with pytest.raises(UserError, match=r"a.jsonl:11: not valid JSON.*data.on_bad_row: skip"):
            for step in itertools.count():
                batches[step]
    data = config(tmp_path, path=str(tmp_path), on_bad_row="skip")
    with contextlib.closing(batches_of(data, tokenizer)) as batches:
        for step in range(4):
            batches[step]
        assert batches.counts(3)["skipped_rows"] == 1
    (tmp_path / "b.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match="no rows to stream"):
        load_data(config(tmp_path, path=str(tmp_path / "b.jsonl")), tokenizer)
    (tmp_path / "c.jsonl").write_bytes(b'{"x": 1}\n')
    with pytest.raises(UserError, match="no training examples in 8 rows of c.jsonl: .* 8 skip"):
        load_data(config(tmp_path, path=str(tmp_path / "c.jsonl"), on_bad_row="skip"), tokenizer)


def test_rows_left_out_are_counted_from_the_first_step_on(tmp_path, tokenizer):
    """Also after a resume, and after the first steps were read ahead, as `eva` does."""
    bad = [b"{broken"] * 3
    rows = lines([*texts("a", 10), {"text": "secret"}, *texts("b", 40)]).split(b"\n")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*rows[:2], *bad, *rows[2:]]))
    put(tmp_path, "held.csv", [{"text": "secret"}])
    data = config(
        tmp_path, path=str(tmp_path / "a.jsonl"), test_path=str(tmp_path / "held.csv"),
        on_bad_row="skip",
    )  # fmt: skip
    with contextlib.closing(batches_of(data, tokenizer)) as batches:
        found, positions = [], []
        for step in range(5):
            positions.append(json.loads(json.dumps(batches.position(step) if step else None)))
            batches[step]
            found.append(batches.counts(step))
        assert found[0] == {"skipped_rows": 3}
        assert found[4] == {"skipped_rows": 3, "held_out_rows": 1}
        batches[0]
        assert batches.counts(0) == found[0]
    older = {name: value for name, value in positions[4].items() if name != "left_out"}
    for position, expected in ((positions[4], found[4]), (older, {})):
        with contextlib.closing(batches_of(data, tokenizer)) as again:
            again.seek(4, position)
            again[4]
            assert again.counts(4) == expected
