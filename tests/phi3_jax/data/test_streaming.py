"""Streamed data: rows as they come, in shares, and from any position."""

from __future__ import annotations

import contextlib
import gzip
import json

import datasets
import fsspec
import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.config.data import SourceConfig
from phi3_jax.config.loader import load_config
from phi3_jax.data import chunks, streamed_files
from phi3_jax.data.loading import load_data
from phi3_jax.data.row_streams import Share, open_streams
from phi3_jax.data.stream_batches import Rows
from phi3_jax.data.tokenizer import load_tokenizer
from tests.phi3_jax.conftest import TOKENIZER
from tests.phi3_jax.data.streams import ALONE, batches_of, config, lines, put, texts, words


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


FORMS = [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz"]


def take(stream, count: int, at_once: int = 3) -> list[str]:
    """The texts of the next rows."""
    found: list[str] = []
    while len(found) < count:
        found += [source.row["text"] for source in stream.take(min(at_once, count - len(found)))]
    return found


@contextlib.contextmanager
def opened(path, share=ALONE.share, position=None, seed=0):
    stream = open_streams(SourceConfig(path=str(path)), seed, {})[1](share, position)
    with contextlib.closing(stream):
        yield stream


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_goes_on_where_it_was(tmp_path, form, monkeypatch):
    """From every position, over the end of a file and of a pass."""
    monkeypatch.setattr(streamed_files, "CHUNK_ROWS", 2)
    for name, count in (("a", 7), ("b", 3)):
        put(tmp_path, f"train-{name}{form}", texts(name, count))
    with opened(tmp_path) as stream:
        everything = take(stream, 25)
        assert stream.passes == 2
    assert sorted(everything[:10]) == sorted(
        row["text"] for name, count in (("a", 7), ("b", 3)) for row in texts(name, count)
    )
    for first in range(0, 22, 3):
        with opened(tmp_path) as stream:
            assert take(stream, first) == everything[:first]
            position = json.loads(json.dumps(stream.position))
        with opened(tmp_path, position=position) as again:
            assert take(again, 25 - first) == everything[first:]


@pytest.mark.parametrize("files", [1, 2, 4])
def test_shares_read_every_row_once(tmp_path, files):
    """By files where they divide evenly, else by rows; each pass anew."""
    for number in range(files):
        put(tmp_path, f"train-{number}.jsonl", texts(str(number), 12 // files))
    shares = []
    for index in range(2):
        with opened(tmp_path, Share(index, 2)) as stream:
            shares.append(take(stream, 12))
    for first in (0, 6):
        together = [text for share in shares for text in share[first : first + 6]]
        assert len(set(together)) == 12


def test_urls_and_saved_data_sets(tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe("/stream/train-0.jsonl.gz", gzip.compress(lines(texts("a", 3))))
    files.pipe("/stream/train-1.jsonl", lines(texts("b", 2)))
    with opened("memory://stream") as stream:
        assert sorted(take(stream, 5)) == ["a 0", "a 1", "a 2", "b 0", "b 1"]
    with opened("memory://stream/train-1.jsonl") as stream:
        assert take(stream, 3) == ["b 0", "b 1", "b 0"]
    datasets.Dataset.from_list(texts("c", 4)).save_to_disk(str(tmp_path / "c"))
    for file in (tmp_path / "c").iterdir():
        files.pipe(f"/saved/{file.name}", file.read_bytes())
    with opened("memory://saved") as stream:
        assert take(stream, 4) == ["c 0", "c 1", "c 2", "c 3"]
    for folder in ("/stream", "/saved"):
        files.rm(folder, recursive=True)
    files.pipe("/bad/a.jsonl.gz", b"not compressed")
    with opened("memory://bad/a.jsonl.gz") as stream, pytest.raises(UserError, match="bad/a.jsonl"):
        stream.take(1)
    files.pipe("/bad/a.parquet.gz", b"")
    with pytest.raises(UserError, match="a compressed table cannot be streamed"):
        open_streams(SourceConfig(path="memory://bad/a.parquet.gz"), 0, {})
    files.rm("/bad", recursive=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`me/texts` and `you/held` on the hub: `datasets` itself, reading files of this machine.

    The first has the subset `en` and the revision `v1`.
    """
    for name, count in (("train-0", 5), ("train-1", 4), ("test", 2)):
        put(tmp_path, f"{name}.jsonl", texts(name, count))
    load = datasets.load_dataset

    def load_dataset(path, name, *, split, revision, streaming):
        known = {"me/texts": [(None, None), ("en", "v1")], "you/held": [(None, None)]}
        assert streaming and (name, revision) in known[path]
        held = [str(tmp_path / "test.jsonl")]
        files = {"train": [str(tmp_path / f"train-{i}.jsonl") for i in (0, 1)], "test": held}
        if path == "you/held":
            files = {"train": held}
        return load("json", data_files=files, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_the_hub_is_streamed_by_datasets(hub, tokenizer, tmp_path):
    with opened("me/texts") as stream:
        everything = take(stream, 20)
    assert everything[:9] == everything[9:18] and len(set(everything)) == 9
    for first in (4, 9, 11):
        with opened("me/texts") as stream:
            take(stream, first)
            position = json.loads(json.dumps(stream.position))
        with opened("me/texts", position=position) as again:
            assert take(again, 20 - first) == everything[first:]
    data = config(tmp_path, path="me/texts", test_split="test")
    train, test = load_data(data, tokenizer)
    assert len(test.examples) == 2 and train.report.rows == 8
    source = {"path": "me/texts", "name": "en", "revision": "v1"}
    train, test = load_data(config(tmp_path, **source, test_path="you/held"), tokenizer)
    assert len(test.examples) == 2 and train.report.rows == 8
    with opened("me/texts", Share(1, 2)) as stream:
        assert len(set(take(stream, 4))) == 4


def same(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("packing", [None, "bfd", "bfd_split", "wrapped"])
def test_a_step_is_found_from_a_saved_position(tmp_path, tokenizer, packing, monkeypatch):
    """To the byte, wherever in a block, with the chunks cut as they may be."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 3)
    put(tmp_path, "a.jsonl", [{"text": f"row {i} " + "more " * (i % 5 * 3)} for i in range(11)])
    settings = {} if packing is None else {"packing": True, "packing_strategy": packing}
    data = config(tmp_path, path=str(tmp_path / "a.jsonl"), **settings)
    with contextlib.closing(batches_of(data, tokenizer)) as batches:
        found, positions = [], []
        for step in range(9):
            positions.append(json.loads(json.dumps(batches.position(step) if step else None)))
            found.append(batches[step])
        assert batches.epoch(9) >= 1
        same(batches[2], found[2])  # back from what is remembered
        same(batches[8], found[8])
    for step in (1, 4, 8) if packing is None else (4,):
        with contextlib.closing(batches_of(data, tokenizer)) as again:
            again.seek(step, positions[step])
            assert again.position(step) == positions[step]  # saved again, before any step
            same(again[step], found[step])
    with contextlib.closing(batches_of(data, tokenizer, seed=4)) as other:
        assert not np.array_equal(other[0]["tokens"], found[0]["tokens"])


@pytest.mark.slow
def test_processes_give_the_bytes_of_one(tmp_path, tokenizer):
    put(tmp_path, "a.jsonl", texts("a", 30))
    found = []
    for count in (1, 2):
        data = config(tmp_path, path=str(tmp_path), dataset_num_proc=count)
        with contextlib.closing(batches_of(data, tokenizer)) as batches:
            found.append([batches[step] for step in range(4)])
    for one, two in zip(*found, strict=True):
        same(one, two)


def test_each_share_fills_its_own_rows(tmp_path, tokenizer):
    """The others' rows repeat them, so that shapes and counts are those of the whole."""
    put(tmp_path, "a.jsonl", texts("a", 16))
    data = config(tmp_path, path=str(tmp_path))
    seen = []
    for index in range(2):
        rows = Rows(Share(index, 2), (0, 1, 0, 1))
        with contextlib.closing(batches_of(data, tokenizer, rows)) as batches:
            batch = batches[0]
        assert batch["tokens"].shape == (2, 4, 16)
        np.testing.assert_array_equal(batch["tokens"][:, :2], batch["tokens"][:, 2:])
        seen += words({"tokens": batch["tokens"][:, :2]}, tokenizer)
    assert len(set(seen)) == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "training.max_steps: data.streaming needs it"),
        (["training.train_sampling_strategy=group_by_length"], "needs the lengths of all rows"),
        (["data.test_size=5"], "data.test_size: data.streaming cannot hold out a part"),
        (["data.max_samples=5"], "data.max_samples: not with data.streaming"),
        (["data.split='train[:5%]'"], "reads whole splits, not slices"),
        (["data.stopping_strategy=all_exhausted"], "each source begins again by itself"),
        (["data.streaming=false", "data.shuffle_buffer_size=5"], "needs data.streaming: true"),
        (["sweep.r=[1, 2]"], "a sweep needs data that can be read in any order"),
    ],
)
def test_what_a_stream_cannot_do(overrides, message):
    asked = ["data.path=a.jsonl", "data.split=train", "data.test_split=null"]
    with pytest.raises(UserError, match=message):
        load_config("phi3_mini_4k_lora", [*asked, "data.streaming=true", *overrides])
