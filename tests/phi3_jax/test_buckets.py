"""Buckets: read for models and adapters, written as a run's folder.

With an fsspec file system in memory; where gcsfs and an emulator of Google Cloud Storage are
installed, with these as well.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import shutil
import time
import uuid

import fsspec
import pytest

from phi3_jax import UserError, buckets, resolve
from phi3_jax.buckets import Bucket, Outage, fetch, may_pass, scheme_of
from phi3_jax.cli import main as cli
from phi3_jax.training import lock, loop, mirror
from phi3_jax.training.loop import train
from phi3_jax.training.mirror import Mirror
from phi3_jax.training.output import open_output
from phi3_jax.training.sweep.members import sweep_members
from phi3_jax.training.sweep.run import train_sweep
from tests.phi3_jax.conftest import make_config, write_config

ADAPTER = "adapter/adapter_model.safetensors"
# Of aiohttp, about a put of more than a MiB.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body")


@pytest.fixture(params=["memory", "emulator"])
def url(request, tmp_path, monkeypatch):
    """The URL of an empty folder in a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    if request.param == "memory":
        monkeypatch.setattr(buckets, "_file_system", lambda scheme: fsspec.filesystem("memory"))
    else:
        request.getfixturevalue("gs")
    return f"gs://bucket/{uuid.uuid4().hex}"


def upload(folder, url: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            Bucket(url).upload(file, file.relative_to(folder).as_posix())


def test_schemes():
    assert scheme_of("gs://b/x") == "gs" and scheme_of("hdfs:/x") == "hdfs"
    for local in ("microsoft/phi-4", "/x/gs://b", "runs/a", "C:/runs", "~/x", "name:1/x"[5:]):
        assert scheme_of(local) == ""


def test_objects(url, tmp_path):
    bucket = Bucket(url)
    assert bucket.files() == {} and bucket.read("x") is None
    bucket.write("x", b"1")
    bucket.write("a/b", b"22")
    assert bucket.read("x") == b"1"
    first = bucket.files()
    assert {name: size for name, (size, _) in first.items()} == {"x": 1, "a/b": 2}
    bucket.write("x", b"3")
    assert bucket.files()["x"] != first["x"] and bucket.files()["a/b"] == first["a/b"]
    bucket.download("a/b", tmp_path / "deep" / "c")
    assert (tmp_path / "deep" / "c").read_bytes() == b"22"
    for _ in range(2):
        bucket.remove("x")
    assert list(bucket.files()) == ["a/b"]


def test_copies_are_kept_while_the_bucket_is_the_same(url, tmp_path, monkeypatch):
    bucket = Bucket(url)
    for name in ("a.json", "b/c.json"):
        bucket.write(name, name.encode())
    downloads = []
    real = Bucket.download
    monkeypatch.setattr(Bucket, "download", lambda *a: downloads.append(a[1]) or real(*a))
    for _ in range(2):
        folder = fetch(url, tmp_path / "copies")
        assert sorted(downloads) == ["a.json", "b/c.json"]
    bucket.write("a.json", b"other")
    bucket.remove("b/c.json")
    assert fetch(url, tmp_path / "copies") == folder
    assert [f.name for f in folder.rglob("*") if f.is_file()] == ["a.json"]
    assert (folder / "a.json").read_bytes() == b"other" and len(downloads) == 3
    for damaged in (b"", b"[1]", b"\xff", b"[" * 5000):
        index = next((tmp_path / "copies").glob("*.json"))
        index.write_bytes(damaged)
        assert fetch(url, tmp_path / "copies") == folder
        assert (folder / "a.json").read_bytes() == b"other"
    file = fetch(f"{url}/a.json", tmp_path / "copies")
    assert file.name == "a.json" and file.read_bytes() == b"other"
    with pytest.raises(UserError, match="no such file or folder"):
        fetch(f"{url}/none", tmp_path / "copies")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("ftp://b/x", "only gs:// and s3:// are supported, not ftp:/"),
        ("gs:/b/x", "only gs:// and s3:// are supported"),
        ("gs://b", "name a folder in the bucket"),
        ("gs:///x", "name a folder in the bucket"),
    ],
)
def test_urls_that_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        resolve(wrong)


def test_a_missing_package(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"needs the package s3fs: pip install .*\[buckets\]"):
        Bucket("s3://b/x")


def test_the_clients_print_no_traceback(monkeypatch):
    """A request that failed for good is an error of ours, in a line."""
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme: None)
    for scheme, package in buckets.PACKAGES.items():
        buckets._file_system(scheme)
        assert not logging.getLogger(package).isEnabledFor(logging.ERROR)


def test_a_bucket_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(buckets, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(buckets, "_file_system", lambda scheme: time.sleep(2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="no answer within 0 s"):
        with open_output("gs://b/run", resume=False):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), True),
        (type("ClientError", (Exception,), {"__module__": "aiohttp.client_exceptions"})(), True),
        (type("ProxyError", (OSError,), {"__module__": "x", "code": "503"})(), True),
        (type("HttpError", (Exception,), {"code": 429})(), True),
        (type("ClientError", (Exception,), {"__module__": "aiohttp", "status": 403})(), False),
        (OSError("Forbidden: x"), False),
        (FileNotFoundError("x"), False),
        (PermissionError("x"), False),
    ],
)
def test_errors_that_may_pass(error, passes):
    assert may_pass(error) == passes


class Switch:
    """A file system in memory that can be away."""

    away = False

    def __getattr__(self, name):
        if self.away:
            raise ConnectionResetError("connection reset")
        return getattr(fsspec.filesystem("memory"), name)


@pytest.fixture
def switch(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    found = Switch()
    monkeypatch.setattr(buckets, "_file_system", lambda scheme: found)
    return found


def test_a_bucket_that_is_away_for_a_while(switch, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}")
    copied = Mirror(Bucket(f"gs://bucket/{uuid.uuid4().hex}"), tmp_path / "run")
    switch.away, pauses = True, []

    def sleep(seconds):
        pauses.append(seconds)
        switch.away = len(pauses) < 8

    monkeypatch.setattr(time, "sleep", sleep)
    copied.push()
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    assert copied.bucket.read("metrics.jsonl") == b"{}"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "connection reset" in said[0] and "answers again" in said[1]
    assert "trying again for up to 10 minutes" in said[0]
    switch.away, copied._patience = True, 0.0
    (tmp_path / "run/metrics.jsonl").write_text("{} {}")
    with pytest.raises(Outage, match=r"connection reset.* Nothing was lost: .*/run has the files"):
        copied.push()
    assert (tmp_path / "run/metrics.jsonl").read_text() == "{} {}"


@pytest.mark.slow
def test_a_bucket_that_stays_away(switch, checkpoint, chats, tmp_path, monkeypatch, capsys):
    """The run ends with a code for which it is started again, and continues to the same bytes."""
    monkeypatch.setattr(mirror, "OUTAGE_SECONDS", 0.1)
    settings = {"max_steps": 3, "save_steps": 1}
    whole = train(make_config(checkpoint, chats, tmp_path / "whole", **settings))
    url = f"gs://bucket/{uuid.uuid4().hex}"
    file = write_config(make_config(checkpoint, chats, url, **settings), tmp_path / "config.yaml")
    command = ["train", "--config", str(file), "--resume=auto"]
    switch.away = True
    assert cli.main(command) == 2  # a first start: the URL may be wrong
    assert not (tmp_path / "cache/phi3-jax/runs").exists()
    switch.away = False
    real_step = loop.Run.start_step

    def step(run):
        if run.step == 1:
            run.checkpoints.wait()
            switch.away = True
        return real_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "start_step", step)
        assert cli.main(command) == 4
    capsys.readouterr()
    assert cli.main(command) == 4
    said = capsys.readouterr().err
    assert "connection reset" in said and "keeps what this machine had of the run" in said
    assert list((tmp_path / "cache").glob("phi3-jax/runs/*/checkpoints/2"))
    switch.away = False
    assert cli.main(command) == 0
    assert Bucket(url).read(ADAPTER) == (whole.adapter.parent / ADAPTER).read_bytes()


def test_a_bucket_that_refuses(monkeypatch):
    def refuse(scheme):
        raise OSError("Forbidden: 403\nmore")

    monkeypatch.setattr(buckets, "_file_system", refuse)
    with pytest.raises(UserError, match="gs://b/x: OSError: Forbidden: 403; check its name"):
        Bucket("gs://b/x")


def test_a_second_run_is_refused(url):
    with open_output(url, resume=False):
        with pytest.raises(UserError, match="another run writes to this folder: process"):
            lease_of_another(url)
            with open_output(url, resume=False):
                pass


def lease_of_another(url: str) -> None:
    """As if a process of another host held the lease."""
    found = json.loads(Bucket(url).read(".lock"))
    Bucket(url).write(".lock", json.dumps(found | {"host": "other", "id": "x"}).encode())


@pytest.mark.slow
def test_a_run_in_a_bucket(url, checkpoint, chats, tmp_path, monkeypatch):
    """Model and output in a bucket; killed, and continued on a machine without any copy."""
    upload(checkpoint, f"{url}/model")
    settings = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1}
    whole = train(make_config(checkpoint, chats, tmp_path / "whole", **settings))
    config = make_config(f"{url}/model", chats, f"{url}/run", **settings)
    file = write_config(config, tmp_path / "config.yaml")
    real_step = loop.Run.start_step

    def step(run):
        if run.step == 3:
            raise RuntimeError("killed")
        return real_step(run)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(loop.Run, "start_step", step)
        train(config)
    bucket = Bucket(f"{url}/run")
    assert {name.split("/")[1] for name in bucket.files() if "checkpoints/" in name} == {"2"}
    bucket.write("checkpoints/3/state/x", b"half a checkpoint")
    shutil.rmtree(tmp_path / "cache")
    assert (
        cli.main(["train", "--config", str(file)]) == 2
    )  # holds the checkpoints of an earlier run
    assert cli.main(["train", "--config", str(file), "--resume=auto"]) == 0
    assert bucket.read(ADAPTER) == (whole.adapter.parent / ADAPTER).read_bytes()
    names = set(bucket.files())
    assert {name.split("/")[1] for name in names if "checkpoints/" in name} == {"4"}
    assert {"config.yaml", "metrics.jsonl", "adapter/README.md"} <= names and ".lock" not in names
    steps = [json.loads(line)["step"] for line in bucket.read("metrics.jsonl").splitlines()]
    assert steps == [1, 2, 3, 4]
    assert (resolve(f"{url}/run/adapter") / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "--model", "m", "--adapter", "a", "--output", "gs://b/x"],
        ["export", "--model", "m", "--output", "s3://b/x"],
        ["evaluate", "--config", "c", "--output", "gs://b/x"],
        ["init", "quickstart", "--output", "gs://b/x.yaml"],
        ["preview", "--config", "c", "--html", "gs://b/x"],
        ["export", "--run", "s3://b/x", "--format", "peft", "--output", "o"],
        ["generate", "--model", "m", "--file", "gs://b/x"],
        ["plan", "--config", "c", "--topology", "cpu:1", "--model-config", "gs://b/x"],
        ["convert-config", "gs://b/x"],
        ["push", "gs://b/x", "me/x"],
        ["report", "gs://b/x"],
    ],
)
def test_commands_that_take_local_paths(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 2
    (given,) = (word for word in command if "://" in word)
    scheme = given[: given.index("b/")]
    assert f"{given}: a local path is needed here, not {scheme}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_a_sweep_in_a_bucket(url, checkpoint, chats, tmp_path, monkeypatch):
    """Every member's files are in the bucket, and a new machine continues from there."""
    monkeypatch.chdir(tmp_path)
    data = {"test_size": 3, "max_length": 64, "pad_to_multiple_of": 64}
    config = make_config(checkpoint, chats, url, data, max_steps=2, save_steps=1, eval_steps=1)
    lists = {"learning_rate": [1e-2, 1e-9, 1e-3], "stop": [1]}
    config = config.model_copy(update={"sweep": type(config.sweep)(**lists)})
    finished = train_sweep(config)
    files = {name: Bucket(url).read(name) for name in Bucket(url).files()}
    for member in sweep_members(config):
        assert member.config.training.output_dir == f"{url}/{member.name}"
        assert f"output_dir: {url}/{member.name}\n".encode() in files[f"{member.name}/config.yaml"]
        assert f"{member.name}/metrics.jsonl" in files
        assert (f"{member.name}/{ADAPTER}" in files) == (member.name in finished.adapters)
    best = json.loads(files["sweep.json"])["members"][0]
    assert best["adapter"] == f"{url}/{finished.best}/adapter"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]

    shutil.rmtree(tmp_path / "cache")
    for name in files:
        if name.startswith("checkpoints/2/") or "/adapter/" in name:
            Bucket(url).remove(name)
    assert train_sweep(config, resume=True).losses == finished.losses
    for name in finished.adapters:
        assert Bucket(url).read(f"{name}/{ADAPTER}") == files[f"{name}/{ADAPTER}"]
