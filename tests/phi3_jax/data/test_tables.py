"""Parquet and Arrow tables: the nulls of their rows, and damaged texts."""

from __future__ import annotations

import contextlib

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from phi3_jax import UserError
from phi3_jax.config.data import SourceConfig
from phi3_jax.data.cache import open_cache
from phi3_jax.data.chunks import rows_of_file
from phi3_jax.data.reading import find_files
from phi3_jax.data.row_streams import Share, open_streams
from phi3_jax.data.streaming import _from_hub as hub_rows


def rows(path):
    with open_cache(path.parent / "cache") as cache:
        (file,) = find_files(str(path), None, "train").files
        return [source.row for source in rows_of_file(file, cache.scratch)]


def streamed_rows(path, count):
    _, opened = open_streams(SourceConfig(path=str(path)), 0, {})
    with contextlib.closing(opened(Share(), None)) as stream:
        return [source.row for source in stream.take(count)]


def test_tables_lose_the_nulls_that_arrow_adds(tmp_path):
    calls = [{"name": "f", "arguments": {"a": "1"}}, {"name": "g", "arguments": {"b": "2"}}]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"calls": calls}]).to_parquet(str(path))
    assert rows(path) == streamed_rows(path, 1) == [{"calls": calls}]


@pytest.mark.parametrize("form", ["parquet", "saved", "hub"])
def test_json_in_tables_keeps_its_nulls(tmp_path, form, monkeypatch):
    tools = [{"name": "f", "default": None, "enum": ["a", None]}, {"name": "g", "default": 3}]
    row = {"text": "x", "tools": tools, "more": {"absent": None, "json": {"a": None, "b": "c"}}}
    json = datasets.Json()
    features = {"text": datasets.Value("string"), "tools": datasets.List(json)}
    features |= {"more": {"absent": datasets.Value("string"), "json": json}}
    table = datasets.Dataset.from_list([row] * 2, features=datasets.Features(features))
    path = tmp_path / f"a.{form}"
    expected = [row | {"more": {"json": row["more"]["json"]}}] * 2
    if form == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table.to_iterable_dataset())
        assert streamed_rows("me/tools", 2) == expected
        (held_out,) = hub_rows(SourceConfig(path="me/tools"), "test", None, tmp_path).files
        path = held_out.path
    else:
        table.to_parquet(str(path)) if form == "parquet" else table.save_to_disk(str(path))
        assert streamed_rows(path, 2) == expected
    assert rows(path) == expected


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_a_table_with_damaged_texts(tmp_path, suffix):
    """Arrow itself would follow whatever its offsets say."""
    texts = pyarrow.array([b"a", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    table, path = pyarrow.table({"text": texts}), tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match="Invalid UTF8") as error:
        rows(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
