"""Runs of several processes on 127.0.0.1, joined by Gloo: what one process gives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.conftest import ROOT
from tests.phi3_jax.conftest import make_config

ADAPTER = "run/adapter/adapter_model.safetensors"


def write_config(folder: Path, checkpoint, chats, mesh: tuple[int, int, int], **training) -> Path:
    """A run of four rows a micro-batch, in a folder `run` of whatever folder it is started in."""
    data, fsdp, tensor = mesh
    settings = {"per_device_train_batch_size": 4 // (data * fsdp), "eval_steps": 3} | training
    config = make_config(
        checkpoint, chats, Path("run"), {"test_size": 3, "packing": True},
        per_device_eval_batch_size=1, sample_prompts=["Tell me about tea."],
        sample_max_new_tokens=8, **settings,
    )  # fmt: skip
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump() | {"mesh": sizes}))
    return file


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(config: Path, folder: Path, processes: int, devices: int, *args: str):
    """`train.py` in so many processes of so many devices, each in a folder of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    address = f"127.0.0.1:{free_port()}"
    started = []
    for number in range(processes):
        own = folder / str(number)
        own.mkdir(exist_ok=True, parents=True)
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), *args]
        with (own / "log.txt").open("a") as log:
            started.append(
                subprocess.Popen(command, cwd=own, env=environment, stdout=log, stderr=log)
            )
    return started


def finish(started, folder: Path, expected: int = 0) -> None:
    codes = [process.wait(300) for process in started]
    logs = "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("*/log.txt")))
    assert codes == [expected] * len(started), logs


def trained(config: Path, folder: Path, processes: int, devices: int, *args: str) -> Path:
    finish(start(config, folder, processes, devices, *args), folder)
    return folder / "0" / ADAPTER


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2, 1), (2, 1, 2)], ids=str)
def test_several_processes_are_one(checkpoint, chats, tmp_path, mesh):
    """The same bytes, of which only the first process writes any."""
    config = write_config(tmp_path, checkpoint, chats, mesh)
    devices = mesh[0] * mesh[1] * mesh[2]
    alone = trained(config, tmp_path / "alone", 1, devices)
    several = trained(config, tmp_path / "several", devices, 1)
    assert several.read_bytes() == alone.read_bytes()
    metrics = [tmp_path / name / "0/run/samples.jsonl" for name in ("alone", "several")]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()
    for number in range(1, devices):
        assert [f.name for f in (tmp_path / "several" / str(number)).iterdir()] == ["log.txt"]


@pytest.mark.slow
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
def test_what_reads_whole_weights(checkpoint, chats, tmp_path, peft, quantization):
    """Starts and exports that need a weight of which each process holds a part."""
    config = write_config(tmp_path, checkpoint, chats, (1, 2, 1), max_steps=2, save_steps=None)
    raw = yaml.safe_load(config.read_text())
    raw["peft"].update(peft)
    raw["model"]["quantization"] = quantization
    config.write_text(yaml.safe_dump(raw))
    alone = trained(config, tmp_path / "alone", 1, 2)
    assert trained(config, tmp_path / "several", 2, 1).read_bytes() == alone.read_bytes()


@pytest.mark.slow
def test_two_processes_of_two_devices(checkpoint, chats, tmp_path):
    """Gloo adds four gradients in another order than one process does."""
    config = write_config(tmp_path, checkpoint, chats, (2, 2, 1))
    alone = load_file(trained(config, tmp_path / "alone", 1, 4))
    for name, value in load_file(trained(config, tmp_path / "several", 2, 2)).items():
        np.testing.assert_allclose(value, alone[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_told_to_end_all_stop_and_resume(checkpoint, chats, tmp_path):
    """SIGTERM to one of them; all end after the same step, and go on to the same bytes."""
    config = write_config(tmp_path, checkpoint, chats, (2, 1, 1), max_steps=24, save_steps=12)
    whole = trained(config, tmp_path / "whole", 2, 1)
    folder = tmp_path / "parts"
    started = start(config, folder, 2, 1)
    metrics = folder / "0/run/metrics.jsonl"
    while not (metrics.exists() and '"grad_norm"' in metrics.read_text()):
        assert started[0].poll() is None, (folder / "0/log.txt").read_text()
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    finish(started, folder, expected=128 + signal.SIGTERM)
    assert "a checkpoint was saved" in (folder / "1/log.txt").read_text()
    assert not (folder / "0/run/adapter").exists()
    assert trained(config, folder, 2, 1, "--resume").read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_what_one_finds_wrong_all_say(checkpoint, chats, tmp_path):
    """None is left waiting for one that has ended."""
    config = write_config(tmp_path, checkpoint, chats, (2, 1, 1))
    finish(start(config, tmp_path / "runs", 2, 1, "--resume"), tmp_path / "runs", expected=2)
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
        finish(start(config, tmp_path / name, 2, 1), tmp_path / name, expected=2)
        assert error in (tmp_path / name / "0/log.txt").read_text()
        assert error in (tmp_path / name / "1/log.txt").read_text()
    narrow = write_config(tmp_path, checkpoint, chats, (1, 1, 1))
    finish(start(narrow, tmp_path / "narrow", 2, 1), tmp_path / "narrow", expected=2)
    assert "leaves processes [1] without a device" in (tmp_path / "narrow/1/log.txt").read_text()
