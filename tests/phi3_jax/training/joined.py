"""Starts processes that join for one run, and gives joined processes one run after another."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import QUICK_TO_COMPILE, ROOT
from tests.forked import Forked

# Where a run whose output_dir is `run` writes its adapter.
ADAPTER = "run/adapter/adapter_model.safetensors"
# How long a device waits for the others of its process in a collective operation.
STUCK_SECONDS = 15


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(
    script: Path, processes: int, devices: int, *args: str, popen=Forked, **settings
) -> list[Forked]:
    """Start a Python script in several processes that join, with `devices` devices each."""
    flags = {"xla_force_host_platform_device_count": devices}
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
        flags |= QUICK_TO_COMPILE
    if devices > 1:  # see `run_until_unstuck`
        flags["xla_cpu_collective_call_terminate_timeout_seconds"] = STUCK_SECONDS
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(f"--{name}={value}".lower() for name, value in flags.items()),
        "PYTHONPATH": str(ROOT),
    }
    caches = Path(os.environ["TEST_CACHES"])
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    return [
        popen(
            [sys.executable, str(script), *args],
            env=environment
            | {"JAX_PROCESS_ID": str(number), "XDG_CACHE_HOME": str(caches / f"{number}")},
            **{name: values[number] for name, values in settings.items()},
        )
        for number in range(processes)
    ]


def own_folders(folder: Path, processes: int) -> list[Path]:
    folders = [folder / str(number) for number in range(processes)]
    for own in folders:
        own.mkdir(exist_ok=True, parents=True)
    return folders


def logs(folder: Path) -> str:
    return "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("*/log.txt")))


class Processes:
    """Joined processes that take one run after another, since starting costs more than a run.

    Args:
        processes: number of processes.
        devices: number of devices of each.
    """

    def __init__(self, processes: int, devices: int):
        pipes = [subprocess.PIPE] * processes
        self.started = start(
            Path(__file__).with_name("process.py"), processes, devices,
            stdin=pipes, stdout=pipes,
        )  # fmt: skip

    def run(self, config: Path, folder: Path, *args: str, expected: int = 0) -> Path:
        """`train.py`, each process in a folder of its own; returns the first one's adapter."""
        command = ["train", "--config", str(config), *args]
        folders = own_folders(folder, len(self.started))
        for process, own in zip(self.started, folders, strict=True):
            print(json.dumps([str(own), command]), file=process.stdin, flush=True)
        codes = [answer(process) for process in self.started]
        assert codes == [str(expected)] * len(self.started), logs(folder)
        return folder / "0" / ADAPTER

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_) -> None:
        for process in self.started:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.started:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def answer(process: Forked) -> str:
    """The next line a process prints; empty if it died or takes more than five minutes."""
    ready, _, _ = select.select([process.stdout], [], [], 300)
    return process.stdout.readline().strip() if ready else ""


def run_until_unstuck(
    config: Path, folder: Path, processes: int, devices: int, attempts: int = 6
) -> Path:
    """`Processes.run`, repeated while XLA aborts a program that is stuck.

    With several CPU devices in a process and fewer cores, XLA may start collectives in a different
    order on each device, which then wait for each other until it gives up.
    """
    try:
        with Processes(processes, devices) as started:
            return started.run(config, folder)
    except AssertionError:
        texts = [log.read_text() for log in folder.glob("*/log.txt")]
        if attempts == 1 or not any("Termination timeout for `" in text for text in texts):
            raise
    return run_until_unstuck(config, folder / "again", processes, devices, attempts - 1)
