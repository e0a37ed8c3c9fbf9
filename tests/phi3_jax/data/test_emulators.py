"""Data in `gs://` and `s3://`, read from emulators on this machine where they are installed."""

from __future__ import annotations

import gzip
import json

import datasets
import fsspec
import pytest

from phi3_jax import UserError
from phi3_jax.config.data import DataConfig
from phi3_jax.data.dataset import load_examples
from phi3_jax.data.loading import load_data
from phi3_jax.data.tokenizer import load_tokenizer
from tests.phi3_jax.conftest import TOKENIZER

# The emulators and their clients use what newer Pythons deprecate, and aiohttp warns about a put of
# more than a MiB.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Sending a large body"
)


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(params=["gs", "s3"])
def bucket(request):
    """A bucket's URL, and how to put an object there."""
    url = request.getfixturevalue(request.param)
    files, root = fsspec.core.url_to_fs(url)
    yield url, lambda name, content: files.pipe_file(f"{root}/{name}", content)
    files.rm(root + "/" + "data", recursive=True)
    files.invalidate_cache()


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def texts(split, tokenizer):
    return [tokenizer.decode(e.tokens, skip_special_tokens=True) for e in split.examples]


def test_files_and_folders(bucket, tmp_path, tokenizer):
    url, put = bucket
    put("data/train-0.jsonl", lines("a", "b"))
    put("data/train-1.jsonl.gz", gzip.compress(lines("c")))
    put("data/test.csv", b"text\nd\n")
    cache = str(tmp_path / "cache")
    for path in (f"{url}/data", f"{url}/data/"):
        config = DataConfig(path=path, test_path=path, cache_dir=cache)
        train, test = load_examples(config, tokenizer)
        assert (texts(train, tokenizer), texts(test, tokenizer)) == (["a", "b", "c"], ["d"])
    put("data/train-0.jsonl", lines("e"))
    train, _ = load_examples(
        DataConfig(path=f"{url}/data/train-0.jsonl", cache_dir=cache), tokenizer
    )
    assert texts(train, tokenizer) == ["e"]
    with pytest.raises(UserError, match="nowhere.jsonl: cannot be read") as caught:
        load_examples(DataConfig(path=f"{url}/data/nowhere.jsonl", cache_dir=cache), tokenizer)
    assert "\n" not in str(caught.value)


def test_saved_and_streamed(bucket, tmp_path, tokenizer):
    url, put = bucket
    datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(5)]).save_to_disk(
        str(tmp_path / "saved")
    )
    for file in (tmp_path / "saved").iterdir():
        put(f"data/saved/{file.name}", file.read_bytes())
    put("data/held/test.jsonl", lines("row 2"))
    own = {"cache_dir": str(tmp_path / "cache"), "path": f"{url}/data/saved"}
    train, _ = load_data(DataConfig.model_validate(own), tokenizer)
    assert len(train.examples) == 5
    own |= {"streaming": True, "shuffle_buffer_size": 5, "dataset_num_proc": 1}
    own |= {"test_path": f"{url}/data/held"}
    train, test = load_data(DataConfig.model_validate(own), tokenizer)
    assert sorted(texts(train, tokenizer)) == ["row 0", "row 1", "row 3", "row 4"]
    assert len(test.examples) == 1
