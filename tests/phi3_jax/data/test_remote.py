"""Data behind URLs: fsspec's memory file system, and an HTTP server on this machine."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import threading

import datasets
import fsspec
import pytest

from phi3_jax import UserError
from phi3_jax.config.data import DataConfig
from phi3_jax.data.dataset import load_examples
from phi3_jax.data.reading import held_out_split
from phi3_jax.data.tokenizer import load_tokenizer
from tests.phi3_jax.conftest import TOKENIZER


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if "/." in self.path:  # as many servers do with hidden files
            self.send_error(403)
        else:
            super().do_GET()


@pytest.fixture(params=["memory", "http"])
def bucket(request, tmp_path):
    """A folder's URL, and how to put a file there."""
    if request.param == "memory":
        files = fsspec.filesystem("memory")
        yield "memory://bucket", lambda name, content: files.pipe(f"/bucket/{name}", content)
        files.rm("/bucket", recursive=True)
        return
    root = tmp_path / "served"

    def put(name, content):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(root))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", put
    server.shutdown()
    server.server_close()


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts(split, tokenizer):
    return [tokenizer.decode(e.tokens, skip_special_tokens=True) for e in split.examples]


def test_files_and_folders(bucket, tmp_path, tokenizer):
    url, put = bucket
    put("data/train-00000-of-00002.jsonl", lines("a", "b"))
    put("data/train-00001-of-00002.jsonl.gz", gzip.compress(lines("c")))
    put("data/test.jsonl", lines("d"))
    put("dataset_infos.json", b"{}")
    cache = str(tmp_path / "cache")
    config = DataConfig(path=url, test_split="test", cache_dir=cache)
    train, test = load_examples(config, tokenizer)
    assert texts(train, tokenizer) == ["a", "b", "c"]
    assert texts(test, tokenizer) == ["d"]
    assert held_out_split(url) == "test"
    # A single file; and the same one held out of the folder.
    file = f"{url.rstrip('/')}/data/train-00000-of-00002.jsonl"
    train, test = load_examples(DataConfig(path=url, test_path=file, cache_dir=cache), tokenizer)
    assert (texts(train, tokenizer), texts(test, tokenizer)) == (["c"], ["a", "b"])
    # Changed in place.
    put("data/train-00000-of-00002.jsonl", lines("e", "f"))
    train, _ = load_examples(DataConfig(path=file, cache_dir=cache), tokenizer)
    assert texts(train, tokenizer) == ["e", "f"]
    put("data/train-00000-of-00002.jsonl", b"{broken\n")
    with pytest.raises(UserError) as caught:
        load_examples(DataConfig(path=file, cache_dir=cache), tokenizer)
    assert str(caught.value).startswith(f"{file}:1: not valid JSON")


def test_a_downloaded_repository_has_its_configurations(bucket, tmp_path, tokenizer):
    url, put = bucket
    card = b"---\nconfigs:\n- {config_name: x, data_files: 'x/*.jsonl'}\n- {config_name: y}\n---\n"
    put("README.md", card)
    put("x/one.jsonl", lines("a"))
    put("y.jsonl", lines("b"))
    cache = str(tmp_path / "cache")
    train, _ = load_examples(DataConfig(path=url, name="x", cache_dir=cache), tokenizer)
    assert texts(train, tokenizer) == ["a"]
    with pytest.raises(UserError, match="choose one with data.name: x, y") as caught:
        load_examples(DataConfig(path=url, cache_dir=cache), tokenizer)
    assert str(caught.value).startswith(f"{url}: ")


def test_saved_data_sets(bucket, tmp_path, tokenizer):
    """What `save_to_disk` wrote: a Dataset, and a DatasetDict with its splits."""
    url, put = bucket
    one = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    one.save_to_disk(str(tmp_path / "one"))
    both = {"train": one, "validation": datasets.Dataset.from_list([{"text": "c"}])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "both"))
    for name in ("one", "both"):
        for file in (tmp_path / name).rglob("*"):
            if file.is_file():
                put(file.relative_to(tmp_path).as_posix(), file.read_bytes())
    cache = str(tmp_path / "cache")
    train, _ = load_examples(DataConfig(path=f"{url.rstrip('/')}/one/", cache_dir=cache), tokenizer)
    assert texts(train, tokenizer) == ["a", "b"]
    path = f"{url.rstrip('/')}/both/"
    config = DataConfig(path=path, split="train[1:]", test_path=path, cache_dir=cache)
    train, test = load_examples(config, tokenizer)
    assert (texts(train, tokenizer), texts(test, tokenizer)) == (["b"], ["c"])
    with pytest.raises(UserError, match=r"no split 'dev'; it has \['train', 'validation'\]"):
        load_examples(DataConfig(path=path, split="dev", cache_dir=cache), tokenizer)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere/a.jsonl", "cannot be read"),
        ("http://127.0.0.1:9/a.jsonl", "cannot be read"),
        ("http://127.0.0.1:9/a.pickle", "expected one of .json"),
        ("nonsense://a/b.jsonl", "cannot be read .*nonsense"),
    ],
)
def test_what_cannot_be_reached_is_one_line(url, message, tmp_path, tokenizer):
    with pytest.raises(UserError, match=message) as caught:
        load_examples(DataConfig(path=url, cache_dir=str(tmp_path)), tokenizer)
    assert "\n" not in str(caught.value)
