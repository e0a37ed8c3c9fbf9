"""Files and folders as people have them: encodings, compression, layouts, strict CSV."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import tempfile
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pytest

from phi3_jax import UserError
from phi3_jax.data import json_file, json_list
from phi3_jax.data.chunks import rows_of_file
from phi3_jax.data.files import DataFile, open_file, read_rows
from phi3_jax.data.reading import find_files, held_out_split

ROWS = [{"text": "a\u2028b"}, {"text": "c\u00e9\x00"}, {"text": "d"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read_file(path):
    with tempfile.TemporaryDirectory() as scratch:
        return list(rows_of_file(DataFile(path, str(path)), Path(scratch)))


def rows(path, split="train", name=None):
    found = find_files(str(path), name, split)
    sources = [source for file in found.files for source in read_file(file.path)]
    return [sources[i].row for i in found.numbers(len(sources))]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_encodings_and_line_ends(tmp_path, encoding, ending):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES.replace("\n", ending).encode(encoding))
    assert rows(path) == ROWS


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", zstd), (".xz", lzma.compress)],
)
@pytest.mark.parametrize("format", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
def test_compressed(tmp_path, suffix, compress, format):
    content = "text\nx\n" if format in (".csv", ".tsv") else json.dumps([{"text": "x"}])
    content = content if format not in (".jsonl", ".ndjson") else '{"text": "x"}\n'
    path = tmp_path / f"train{format}{suffix}"
    path.write_bytes(compress(content.encode()))
    assert rows(path) == rows(tmp_path) == [{"text": "x"}]
    path.write_bytes(b"not compressed")
    with pytest.raises(UserError, match="cannot be read"):
        rows(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        "".join(json.dumps(row, indent=2) + "\n" for row in ROWS),
        json.dumps({"version": "1", "data": ROWS}),
        json.dumps({"data": ROWS}, indent=1),
        json.dumps(ROWS, indent=1),
    ],
    ids=["lines", "pretty objects", "wrapped", "wrapped and pretty", "list"],
)
def test_layouts_of_json(tmp_path, text, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text(text, encoding="utf-8")
    assert rows(path) == ROWS


def test_a_single_object_is_a_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "x", "data": [1]}, indent=2))
    assert rows(path) == [{"text": "x", "data": [1]}]


def test_bad_bytes_cost_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\xff"}\n{"text": "b"}\n')
    first, second = read_file(path)
    assert first.where == f"{path}:1" and "not UTF-8" in first.problem
    assert second.row == {"text": "b"}


def test_arrow_in_both_forms(tmp_path):
    wanted = [{"text": f"row {i}"} for i in range(5)]
    table = pyarrow.Table.from_pylist([row | {"more": None} for row in wanted])
    for form in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
        path = tmp_path / f"{form.__name__}.arrow"
        with form(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=2)
        assert [source.row for source in read_file(path)] == [
            {"text": f"row {i}"} for i in range(5)
        ]
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(UserError, match=f"{form.__name__}.arrow: cannot be read"):
            read_file(path)


def test_an_empty_list_has_no_rows(tmp_path):
    (tmp_path / "a.json").write_text(" [ ]\n")
    assert read_file(tmp_path / "a.json") == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json.gz"])
def test_data_that_git_lfs_did_not_download(tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a1\nsize 123\n")
    with pytest.raises(UserError, match=f"{name}: not the data, .*git lfs pull"):
        DataFile(path, str(path)).digest()


def test_tabs_separate_the_fields_of_tsv(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('question\tanswer\n1,5\t"a\tb"\n"x"\t""\n')
    theirs = datasets.load_dataset("csv", data_files=str(path), sep="\t", split="train")
    assert rows(path) == list(theirs) == rows(tmp_path)
    path.write_text('a\tb\n1\t2\t3\n4\t5\n6\t"7\n')
    with pytest.raises(UserError, match=r"a.tsv:4: a quote \(\"\) opens here"):
        read_file(path)
    path.write_text("a\tb\n1\t2\t3\n4\t5\n")
    bad, good = read_file(path)
    assert (bad.where, bad.problem) == (f"{path}:2", "3 fields, the header has 2")
    assert good.row == {"a": "4", "b": "5"}


def test_csv_is_read_strictly(tmp_path):
    path = tmp_path / "a.csv"
    content = '\ufefftext,note\r\nNA,null\r\n"two\nlines",1\r\na,b,c\r\nlast\r\nd,"e"f\r\n'
    path.write_bytes(content.encode() + b"\xff,x\r\n")
    found = list(read_file(path))
    good = [source.row for source in found if not source.problem]
    assert good == [
        {"text": "NA", "note": "null"},
        {"text": "two\nlines", "note": "1"},
        {"text": "last"},
    ]
    bad = [(source.where, source.problem) for source in found if source.problem]
    assert bad[0] == (f"{path}:5", "3 fields, the header has 2")
    assert bad[1][0] == f"{path}:7" and "not valid CSV" in bad[1][1]
    assert bad[2] == (f"{path}:8", "not UTF-8")
    path.write_text("text,text\na,b\n")
    with pytest.raises(UserError, match="duplicate column 'text'"):
        list(read_file(path))


def test_saved_to_disk(tmp_path):
    table = datasets.Dataset.from_list([{"text": f"{i}"} for i in range(4)])
    table.save_to_disk(str(tmp_path / "one"))
    assert rows(tmp_path / "one", "train[1:3]") == [{"text": "1"}, {"text": "2"}]
    datasets.DatasetDict({"train_sft": table, "test": table.select([3])}).save_to_disk(
        str(tmp_path / "several")
    )
    assert rows(tmp_path / "several", "test") == [{"text": "3"}]
    assert rows(tmp_path / "several", "train_sft[:1]") == [{"text": "0"}]
    with pytest.raises(UserError, match=r"no split 'train'; it has \['test', 'train_sft'\]"):
        rows(tmp_path / "several")


@pytest.mark.parametrize(
    ("place", "name"),
    [("data/train-00000-of-00001", None), ("train/0", None), ("main/train", "main")],
)
def test_a_downloaded_repository(tmp_path, place, name):
    for split, text in (("train", "a"), ("test", "b")):
        file = tmp_path / f"{place.replace('train', split)}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([{"text": text}]).to_parquet(str(file))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert rows(tmp_path, "train", name) == [{"text": "a"}]
    assert rows(tmp_path, "test", name) == [{"text": "b"}]


def test_a_repository_with_subsets_names_them(tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-00000-of-00001.jsonl").write_text(LINES)
    with pytest.raises(UserError, match="data.name chooses one of its folders: de, en$"):
        rows(tmp_path)
    assert rows(tmp_path, name="en") == ROWS


# A row that the reader gives up on, between two good ones.
BAD_JSON = {
    "an absurd integer": ('{"text": ' + "9" * 5000 + "}", "Exceeds the limit"),
    "deep nesting": ('{"text": ' + "[" * 9000 + "]" * 9000 + "}", "nested too deeply"),
    "a duplicate key": ('{"text": "a]}", "text": "\\"[{"}', "duplicate key 'text'"),
    "a bare integer": ("9" * 5000, "Exceeds the limit"),
    "bad bytes": ('{"text": "a\udcff"}', "not UTF-8"),
}
AROUND = {
    "list": "[{good}, {bad}, {good}]",
    "pretty list": "[\n {good},\n {bad}\n,\n {good}\n]",
    "wrapped": '{{"version": {{"a": "b"}}, "data": [{good}, {bad},\n{good}], "n": 3}}',
    "several objects": "{good} {bad}\n{good}",
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", BAD_JSON)
def test_a_bad_row_of_a_json_document_costs_that_row(tmp_path, kind, around):
    bad, message = BAD_JSON[kind]
    path = tmp_path / "a.json"
    text = AROUND[around].format(good='{"text": "x"}', bad=bad)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    first, second, third = read_file(path)
    assert first.row == third.row == {"text": "x"}
    assert first.problem is third.problem is None
    assert message in second.problem
    path.write_bytes(text.encode("utf-8", "surrogateescape") + b" ]")
    if around.endswith("list"):
        with pytest.raises(UserError, match="not valid JSON"):
            list(read_file(path))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('a,b\n1,2\n3,"4\n5,6\n7,8\n', 3),
        ('a,b\n"1\n2",3\n"4\n","5 ""\n6\n', 5),
        ('a,b\n1,"', 2),
        ('"a,b\n1,2\n', 1),
    ],
)
def test_a_csv_quote_that_is_not_closed(tmp_path, text, line):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="opens here and is not closed") as caught:
        list(read_file(path))
    assert f"{path}:{line}: " in str(caught.value)


def test_a_csv_field_that_closes_in_another_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,"2\n3,"4"\n5,6\n')
    bad, good = read_file(path)
    assert bad.where == f"{path}:2" and "begins in line 2" in bad.problem
    assert good.row == {"a": "5", "b": "6"}


def test_files_that_are_held_out_by_name_are_not_trained_on(tmp_path):
    names = ("a", "contest", "test", "my_eval", "chats-validation-0001", "dev.set", "eval_train")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert [row["text"] for row in rows(tmp_path)] == ["a", "contest", "eval_train"]
    assert rows(tmp_path, "test") == [{"text": "test"}]
    assert rows(tmp_path, held_out_split(str(tmp_path))) == [{"text": "test"}]
    for name in ("a", "contest", "eval_train"):
        (tmp_path / f"{name}.jsonl").unlink()
    with pytest.raises(UserError, match="no file to train on.*data.split: chats-validation-0001"):
        rows(tmp_path)


JSON_FILES = {
    "list.json": json.dumps(ROWS * 9, ensure_ascii=False),
    "pretty.json": "\n " + json.dumps(ROWS * 9, indent=2) + "\n\n",
    "odd.json": '[1, "a]", {"t": "[\\""}, [], {"a": 1, "a": 2}, -0.5e3, null, {"text": "\udcff"}]',
    "lines.jsonl": LINES * 9,
    "lines.json": LINES * 9 + "\n{broken\n" + LINES,
    "objects.json": "".join(json.dumps(row, indent=1) for row in ROWS),
    "table.csv": 'text,more\n"a\nb",c\n' * 9 + "x,y,z\n",
}


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("piece", [1, 7, 200])
def test_large_files_are_read_like_small_ones(tmp_path, monkeypatch, name, piece):
    """Piece by piece, wherever a piece ends."""
    content = JSON_FILES[name].encode("utf-8", "surrogateescape")
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    expected = read_file(tmp_path / name)
    monkeypatch.setattr(json_file, "LARGE", 2)
    monkeypatch.setattr(json_list, "PIECE", piece)
    for file in (tmp_path / name, tmp_path / f"{name}.gz"):
        found = [dataclasses.replace(s, where=s.where.replace(".gz", "")) for s in read_file(file)]
        assert found == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": 2}', ":2: not valid JSON"),
        ('[{"a": 1}\n\n{"a": 2}]', ":3: not valid JSON .Expecting ',' delimiter"),
        ('[{"a": 1}] x', ":1: not valid JSON .Extra data"),
        ('[{"a": 1},', ":1: not valid JSON"),
        ('[{"a": "b', ":1: not valid JSON .Unterminated string"),
    ],
)
def test_a_large_list_that_is_not_json(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(json_file, "LARGE", 2)
    monkeypatch.setattr(json_list, "PIECE", 3)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=f"a.json{message}"):
        read_file(tmp_path / "a.json")


def test_a_large_list_takes_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "LARGE", 2**16)
    monkeypatch.setattr(json_list, "PIECE", 2**16)
    rows = [{"text": "x" * 1000}] * 8000
    (tmp_path / "a.json").write_text(json.dumps(rows))
    tracemalloc.start()
    with open_file(DataFile(tmp_path / "a.json", "a")) as content:
        assert sum(source.row == rows[0] for source in read_rows("a", ".json", content)) == 8000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22, "half of the file"
