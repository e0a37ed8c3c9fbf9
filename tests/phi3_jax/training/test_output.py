"""The output folder: who may use it, and disks that fail."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax import UserError
from phi3_jax.cli import main as cli
from phi3_jax.training import metrics
from phi3_jax.training.loop import train
from phi3_jax.training.mirror import Mirror
from phi3_jax.training.output import open_output
from tests.conftest import ROOT
from tests.phi3_jax.conftest import make_config, write_config


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs:/b/r", "hdfs://n/r", "file:///r"])
def test_urls_are_refused_and_make_nothing(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=url):
        with open_output(url, resume=False):
            pass
    assert list(tmp_path.iterdir()) == []


def test_auto_starts_and_continues(tmp_path):
    folder = tmp_path / "new" / "run"
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        with open_output(str(folder), resume=True):
            pass
    assert not folder.exists()
    with open_output(str(folder), resume="auto") as opened:
        assert not opened.resume and opened.path.is_dir()
    (folder / "checkpoints" / "3").mkdir(parents=True)
    for resume in (True, "auto"):
        with open_output(str(folder), resume) as opened:
            assert opened.resume and opened.fall_back == (resume == "auto")
    with pytest.raises(UserError, match="pass --resume to continue it"):
        with open_output(str(folder), resume=False):
            pass


def test_a_refused_run_leaves_no_folder(tmp_path):
    (tmp_path / "kept").mkdir()
    for name in ("kept/new/run", "kept"):
        with pytest.raises(UserError), open_output(str(tmp_path / name), resume="auto"):
            raise UserError("no such model")
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


@pytest.mark.parametrize("arguments", [[], ["--resume"], ["--resume=auto"]])
def test_command_line(arguments):
    import argparse

    from phi3_jax.cli import train as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parsed = parser.parse_args(["--config", "x", *arguments, "training.seed=1"])
    assert parsed.resume == (
        arguments[0].endswith("auto") and "auto" or True if arguments else False
    )
    assert parsed.overrides == ["training.seed=1"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--config", "x", "--resume=other"])


def test_two_runs_in_one_folder(tmp_path):
    with open_output(str(tmp_path), resume=False):
        for resume in (False, True, "auto"):
            with pytest.raises(UserError, match=f"another run writes .* process {os.getpid()} on"):
                with open_output(str(tmp_path), resume):
                    pass


def test_leftovers_of_a_crash_are_removed(tmp_path):
    left = [
        "checkpoints/6.orbax-checkpoint-tmp/state/x",
        ".metrics.jsonl.123.tmp",
        "adapter/.adapter_model.safetensors.7.tmp",
        "lr=1/adapter/.README.md.7.tmp",
    ]
    kept = ["checkpoints/3/state/x", "adapter/.hidden", "notes.tmp", "deep/a/b/.x.1.tmp"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with open_output(str(tmp_path), resume="auto"):
        files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {*kept, ".lock"}


def test_folders_that_cannot_be_made(checkpoint, chats, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, said in (
        ("file/run", "file where a folder should be"),
        ("file", "file where a folder should be"),
        ("x" * 300, "too long: choose a shorter"),
    ):
        with pytest.raises(UserError, match=rf"training.output_dir: {tmp_path}/.*{said}"):
            with open_output(str(tmp_path / folder), resume=False):
                pass


def test_a_full_disk_takes_no_half_line(tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from phi3_jax.training.metrics import Lines\n"
        "lines = Lines(Path(sys.argv[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "lines.append('x' * 40)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))\n"
        "try: lines.append('y' * 40)\n"
        "except OSError as error: print(error.filename)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.stdout.strip() == str(tmp_path / "m"), run.stderr
    assert (tmp_path / "m").read_text() == "x" * 40 + "\n"


def fill(tmpfs: Path) -> Path:
    """Take all the space that is left."""
    with (tmpfs / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return tmpfs / "filler"


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)])
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


SETTINGS = {"max_steps": 4, "save_steps": 3, "report_to": ["tensorboard"]}
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def whole(checkpoint, chats, tmp_path_factory) -> bytes:
    """The adapter of a run with enough space."""
    folder = tmp_path_factory.mktemp("whole")
    train(make_config(checkpoint, chats, folder, **SETTINGS))
    return (folder / ADAPTER).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("full_at", [0, 2, 3, 4])
def test_a_full_disk_and_resume(
    checkpoint, chats, whole, tmp_path, small_disk, monkeypatch, capsys, full_at
):
    """Full at the start, at a log line, in a checkpoint, at the end: one line and exit 2."""
    config = make_config(checkpoint, chats, small_disk / "run", **SETTINGS)
    file = write_config(config, tmp_path / "config.yaml")
    fillers = []
    if not full_at:
        fillers.append(fill(small_disk))
    real = metrics.MetricsWriter.write

    def write(self, step, record):
        if step == 2 and full_at == 2:
            fillers.append(fill(small_disk))
        real(self, step, record)
        if step == full_at > 2:
            fillers.append(fill(small_disk))

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsWriter, "write", write)
        assert cli.main(["train", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert "the disk is full: free some space" in said and str(small_disk / "run") in said
    assert len(said.strip().splitlines()) == 1
    fillers[0].unlink()
    assert not list((small_disk / "run").rglob("*tmp*"))
    assert not (small_disk / "run" / "adapter" / "adapter_config.json").exists()
    assert cli.main(["train", "--config", str(file), "--resume=auto"]) == 0
    assert (small_disk / "run" / ADAPTER).read_bytes() == whole


def test_a_read_only_disk(checkpoint, chats, tmp_path, small_disk, capsys):
    config = make_config(checkpoint, chats, small_disk / "run")
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    file = write_config(config, tmp_path / "config.yaml")
    assert cli.main(["train", "--config", str(file)]) == 2
    assert "the file system is read-only: choose another folder" in capsys.readouterr().err


def test_a_file_that_goes_while_a_mirror_looks(tmp_path, monkeypatch):
    """The run writes beside the thread that copies a checkpoint."""
    for name in ("config.yaml", "run.json"):
        (tmp_path / name).write_text("{}")
    is_file = Path.is_file

    def then_removed(path):
        found = is_file(path)
        if path.name == "run.json":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", then_removed)
    assert list(Mirror(None, tmp_path)._local()) == ["config.yaml"]
