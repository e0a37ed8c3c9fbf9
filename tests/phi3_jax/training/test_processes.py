"""Runs of several processes on 127.0.0.1, joined by Gloo: what one process gives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import phi3_jax
from phi3_jax.config.loader import load_config
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.loading import load_data
from phi3_jax.data.row_streams import Share
from phi3_jax.data.stream_batches import Rows, StreamBatches
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.training import state_files
from tests.conftest import ROOT, forward
from tests.forked import Forked
from tests.phi3_jax.conftest import make_config
from tests.phi3_jax.training.joined import (
    Processes,
    free_port,
    logs,
    own_folders,
    run_until_unstuck,
    start,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_anew")]


def write_config(folder: Path, checkpoint, chats, mesh: tuple[int, int, int], **training) -> Path:
    """A run of four rows a micro-batch, in a folder `run` of whatever folder it is started in."""
    data, fsdp, tensor = mesh
    settings = {"per_device_train_batch_size": 4 // (data * fsdp), "eval_steps": None} | training
    section = {"test_size": 4, "packing": True, "max_length": 64, "pad_to_multiple_of": 64}
    config = make_config(
        checkpoint, chats, Path("run"), section, per_device_eval_batch_size=1, **settings
    )
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump() | {"mesh": sizes}))
    return file


@pytest.fixture(scope="module", autouse=True)
def buckets_and_caches(tmp_path_factory):
    """A folder for buckets, which processes share, and caches, of which each has its own."""
    folder = tmp_path_factory.mktemp("machines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_BUCKETS", str(folder / "buckets"))
        patch.setenv("TEST_CACHES", str(folder / "caches"))
        yield folder


@pytest.fixture(scope="module")
def two():
    """Two processes of one device."""
    with Processes(2, 1) as processes:
        yield processes


@pytest.fixture(scope="module")
def one():
    """One process of two devices: the run that several processes must repeat."""
    with Processes(1, 2) as process:
        yield process


@pytest.fixture
def forked():
    """Starts processes by `Forked` that are ended after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(Forked(*args, **settings))


def test_two_processes_are_one(checkpoint, chats, tmp_path, one, two):
    """The same bytes, of which only the first process writes any."""
    config = write_config(
        tmp_path, checkpoint, chats, (1, 2, 1),
        eval_steps=3, sample_prompts=["Tell me about tea."], sample_max_new_tokens=8,
    )  # fmt: skip
    alone = one.run(config, tmp_path / "alone")
    several = two.run(config, tmp_path / "several")
    assert several.read_bytes() == alone.read_bytes()
    samples = [tmp_path / name / "run/samples.jsonl" for name in ("alone/0", "several/0")]
    assert samples[0].read_bytes() == samples[1].read_bytes()
    assert [f.name for f in (tmp_path / "several/1").iterdir()] == ["log.txt"]


def test_four_processes_are_one(checkpoint, chats, tmp_path):
    """With layers cut over two of them."""
    config = write_config(tmp_path, checkpoint, chats, (2, 1, 2), max_steps=4)
    adapters = []
    for count, devices in ((1, 4), (4, 1)):
        with Processes(count, devices) as processes:
            adapters.append(processes.run(config, tmp_path / str(count)).read_bytes())
    assert adapters[0] == adapters[1]
    for number in range(1, 4):
        assert [f.name for f in (tmp_path / "4" / str(number)).iterdir()] == ["log.txt"]


@pytest.fixture(scope="module")
def saved_twice(checkpoint, chats, tmp_path_factory, one):
    """A run with checkpoints at steps 2 and 4: its config, and its adapter's bytes."""
    folder = tmp_path_factory.mktemp("saved")
    config = write_config(folder, checkpoint, chats, (1, 2, 1), max_steps=4, save_steps=2)
    return config, one.run(config, folder).read_bytes()


@pytest.mark.parametrize("where", ["shared folder", "bucket"])
def test_each_process_writes_its_part(tmp_path, one, two, saved_twice, buckets_and_caches, where):
    """Two processes write checkpoints that one reads, and the other way round."""
    config, alone = saved_twice
    folder, url = tmp_path / "shared", f"training.output_dir={tmp_path / 'shared'}"
    if where == "bucket":
        folder = buckets_and_caches / "buckets" / "bucket" / "run"
        url = "training.output_dir=gs://bucket/run"
    adapter = folder / "adapter" / "adapter_model.safetensors"

    def again(processes: Processes, name: str, steps: list[int]) -> None:
        """Continue from step 2, and end with the same bytes and checkpoints."""
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        for step in steps:
            shutil.rmtree(folder / "checkpoints" / str(step))
        processes.run(config, tmp_path / name, url, "--resume=auto")
        assert adapter.read_bytes() == alone
        parts = {2: 2, 4: len(processes.started)}
        for step, count in parts.items():
            state = folder / "checkpoints" / str(step) / "state"
            assert sorted(part.name for part in state.iterdir()) == ["0", "1"][:count]

    again(two, "first", [])
    again(one, "second", [4])
    if where == "shared folder":
        again(two, "third", [4])


def test_parts_are_written_at_the_same_time(tmp_path, forked):
    """Orbax keeps signals under keys that all processes share: none may wait for another's."""
    script = Path(__file__).with_name("parts.py")
    for process in start(script, 2, 1, str(tmp_path), "12", popen=forked):
        assert process.wait(120) == 0
    for step in range(12):
        parts = sorted((state_files.temporary(tmp_path, step) / "state").iterdir())
        assert [part.name for part in parts] == ["0", "1"]


@pytest.mark.parametrize(
    ("peft", "quantization"),
    [
        ({"init_lora_weights": "eva"}, None),
        ({"init_lora_weights": "qera"}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
        (
            {"init_lora_weights": "pissa", "use_dora": True, "modules_to_save": ["lm_head"]}
            | {"target_modules": ["q_proj", "down_proj"]},
            None,
        ),
    ],
    ids=["eva", "qera", "pissa of slices"],
)
def test_what_reads_whole_weights(checkpoint, chats, tmp_path, one, two, peft, quantization):
    """Starts and exports that need a weight of which each process holds a part."""
    config = write_config(tmp_path, checkpoint, chats, (1, 2, 1), max_steps=2, save_steps=None)
    raw = yaml.safe_load(config.read_text())
    raw["peft"].update(peft)
    raw["model"]["quantization"] = quantization
    config.write_text(yaml.safe_dump(raw))
    alone = one.run(config, tmp_path / "alone")
    assert two.run(config, tmp_path / "several").read_bytes() == alone.read_bytes()


def test_a_sweep(checkpoint, chats, tmp_path, one, two):
    """Members on the devices of two processes, one of them stopped early; then resumed."""
    config = write_config(tmp_path, checkpoint, chats, (2, 1, 1), max_steps=4, save_steps=2)

    def run(processes: Processes, name: str, *more: str) -> tuple[dict[str, bytes], object]:
        folder = tmp_path / name / "shared"
        lists = "sweep.learning_rate=[1e-2, 1e-9, 3e-3]", "sweep.stop=[2]"
        processes.run(config, tmp_path / name, *lists, f"training.output_dir={folder}", *more)
        files = folder.glob("*/adapter/*.safetensors")
        rows = json.loads((folder / "sweep.json").read_text())["members"]
        adapters = {file.parts[-3]: file.read_bytes() for file in files}
        return adapters, [row | {"adapter": None} for row in rows]

    alone, several = run(one, "alone"), run(two, "several")
    assert several == alone and len(alone[0]) == 2
    assert [f.name for f in (tmp_path / "several" / "1").iterdir()] == ["log.txt"]
    shared = tmp_path / "several" / "shared"
    shutil.rmtree(shared / "checkpoints" / "4")
    for adapter in shared.glob("*/adapter"):
        shutil.rmtree(adapter)
    assert run(two, "several", "--resume") == alone


def test_two_processes_of_two_devices(checkpoint, chats, tmp_path, monkeypatch):
    """Gloo adds four gradients in another order than one process does.

    Where a gradient is small beside its rounding, Adam moves a weight by a share of the rate.
    """
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # the bound is that of a user's code
    config = write_config(tmp_path, checkpoint, chats, (2, 2, 1), learning_rate=2e-3)
    adapters = []
    for count, devices in ((1, 4), (2, 2)):
        adapters.append(load_file(run_until_unstuck(config, tmp_path / str(count), count, devices)))
    alone, several = adapters
    for name, value in several.items():
        np.testing.assert_allclose(value, alone[name], rtol=0, atol=1e-6)


def start_training(forked, config: Path, folder: Path) -> list[Forked]:
    """Two processes of which the first has logged a step; they continue what is in the folder."""
    folders = own_folders(folder, 2)
    with contextlib.ExitStack() as stack:
        log = [stack.enter_context((own / "log.txt").open("w")) for own in folders]
        started = start(
            ROOT / "train.py", 2, 1, "--config", str(config), "--resume=auto",
            popen=forked, cwd=folders, stdout=log, stderr=log,
        )  # fmt: skip
    while not re.search(r"^step +\d+/\d+  loss ", (folder / "0/log.txt").read_text(), re.MULTILINE):
        assert started[0].poll() is None, logs(folder)
        time.sleep(0.05)
    return started


def test_interrupted_again_and_again(checkpoint, chats, tmp_path, forked, two):
    """What each signal to one of two does to both; the last run ends with the uninterrupted bytes.

    After a signal that can be handled, all stop after the same step, with a checkpoint. When one
    is killed, the other one says so, without a stack.
    """
    config = write_config(tmp_path, checkpoint, chats, (2, 1, 1), max_steps=60, save_steps=20)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        started = start_training(forked, config, tmp_path)
        started[1].send_signal(number)
        codes = [process.wait(300) for process in started]
        assert codes == [128 + signal.SIGTERM, 128 + number], logs(tmp_path)
        assert "a checkpoint was saved" in (tmp_path / "1/log.txt").read_text()
    for killed in (0, 1):
        started = start_training(forked, config, tmp_path)
        started[killed].kill()
        assert started[1 - killed].wait(60) == 3, logs(tmp_path)
        text = (tmp_path / str(1 - killed) / "log.txt").read_text()
        assert f"process {killed} of 2 has ended before the others" in text
        assert "Traceback" not in text and "stack trace" not in text and "Fatal" not in text
    assert not (tmp_path / "0/run/adapter").exists()
    interrupted = two.run(config, tmp_path, "--resume=auto").read_bytes()
    assert interrupted == two.run(config, tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_was_not_started(checkpoint, chats, tmp_path, number):
    config = write_config(tmp_path, checkpoint, chats, (2, 1, 1))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number),
    }  # fmt: skip
    command = [sys.executable, ROOT / "train.py", "--config", config, "--join-timeout", "2"]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 3
    assert "1 of 2 processes are there after 2 s" in run.stderr
    assert "Start the same command on every host" in run.stderr
    assert len(run.stderr.strip().splitlines()) <= 2 and not (tmp_path / "run").exists()


def test_each_streams_its_share(checkpoint, chats, tmp_path, two):
    """The first loss is that of both shares together; a resumed run ends with the same bytes."""
    folder, lines = tmp_path / "chats", chats.read_text().splitlines(keepends=True)
    folder.mkdir()
    for number in range(2):
        (folder / f"train-{number}.jsonl").write_text("".join(lines[number::2]))
    file = write_config(tmp_path, checkpoint, chats, (2, 1, 1), max_steps=2, save_steps=1)
    raw = yaml.safe_load(file.read_text())
    raw["data"] |= {"path": str(folder), "streaming": True, "test_size": None, "packing": False}
    raw["data"] |= {"shuffle_buffer_size": 4}
    file.write_text(yaml.safe_dump(raw))
    finished = two.run(file, tmp_path).read_bytes()

    config, rows = load_config(file), []
    plan = BatchPlan.from_config(config.data, config.training, 2)
    train, _ = load_data(config.data, load_tokenizer(checkpoint))
    for number in range(2):
        share = Rows(Share(number, 2), (0, 1))
        own = dataclasses.replace(plan, train_rows=2)
        with contextlib.closing(
            StreamBatches(train.stream, own, config.training.seed, share)
        ) as batches:
            rows.append(batches[0])
    batch = {name: np.concatenate([own[name] for own in rows]) for name in rows[0]}
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    logits = forward(
        phi3_jax.load(checkpoint), flat["tokens"], flat["positions"], flat["segment_ids"]
    )
    scores = np.asarray(jax.nn.log_softmax(logits[:, :-1]), np.float64)
    taken = np.take_along_axis(scores, flat["tokens"][:, 1:, None], -1)[..., 0]
    expected = -taken[flat["targets"][:, 1:]].mean()
    metrics = (tmp_path / "0/run/metrics.jsonl").read_text().splitlines()
    first = next(record for record in map(json.loads, metrics) if "loss" in record)
    assert first["step"] == 1 and first["loss"] == pytest.approx(expected, rel=1e-4)

    checkpoints = tmp_path / "0/run/checkpoints"
    position = state_files.read_record(checkpoints, 1)["position"]
    assert position["count"] == 2 and sorted(position["shares"]) == ["0", "1"]
    shutil.rmtree(checkpoints / "2")
    shutil.rmtree(tmp_path / "0/run/adapter")
    assert two.run(file, tmp_path, "--resume").read_bytes() == finished


def test_what_one_finds_wrong_all_say(checkpoint, chats, tmp_path, two):
    """None is left waiting for one that has ended."""
    config = write_config(tmp_path, checkpoint, chats, (2, 1, 1))
    two.run(config, tmp_path / "runs", "--resume", expected=2)
    for number in range(2):
        log = (tmp_path / "runs" / str(number) / "log.txt").read_text()
        assert "no checkpoint to resume from" in log
    elsewhere = yaml.safe_load(config.read_text())
    elsewhere["data"]["path"] = "chats.jsonl"
    config.write_text(yaml.safe_dump(elsewhere))
    for name, second, error in (
        ("absent", None, "chats.jsonl: no such file"),
        ("other", "".join(chats.read_text().splitlines(keepends=True)[1:]), "training data ("),
    ):
        for number, text in enumerate([chats.read_text(), second]):
            (tmp_path / name / str(number)).mkdir(parents=True)
            if text is not None:
                (tmp_path / name / str(number) / "chats.jsonl").write_text(text)
        two.run(config, tmp_path / name, expected=2)
        assert error in (tmp_path / name / "0/log.txt").read_text()
        assert error in (tmp_path / name / "1/log.txt").read_text()
    narrow = write_config(tmp_path, checkpoint, chats, (1, 1, 1))
    two.run(narrow, tmp_path / "narrow", expected=2)
    assert "leaves processes [1] without a device" in (tmp_path / "narrow/1/log.txt").read_text()
