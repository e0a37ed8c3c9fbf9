"""Faults of real runs, for benchmarks/faults.py: signals, full disks, and a day in the cloud.

Every run is a small one, started as a command of its own; whatever happens to it, in the end its
adapter must have the bytes of a run that nothing disturbed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import fsspec

from phi3_jax.buckets import Bucket

ROOT = Path(__file__).parents[1]
ADAPTER = "adapter/adapter_model.safetensors"
Add = Callable[[str, str], None]  # a kind of fault, and what was wrong ("" for nothing)


class Run:
    """A small run.

    Args:
        folder: where its model, data, config and caches go.
        steps: how long it is.
    """

    def __init__(self, folder: Path, steps: int):
        from tests.faults.boundaries import Sound
        from tests.faults.inputs import ROWS

        self.folder, self.config = folder, folder / "config.yaml"
        base = Sound(folder / "sound").base
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4] * 4))
        training = {
            "output_dir": "run", "max_steps": steps, "save_steps": 7, "eval_steps": 7,
            "logging_steps": 5, "save_total_limit": 2, "load_best_model_at_end": True,
            "per_device_train_batch_size": 2, "report_to": ["tensorboard"],
        }  # fmt: skip
        settings = {
            "model": {"path": str(base)},
            "peft": {"r": 2, "lora_dropout": 0.1},
            "data": {"path": str(data), "max_length": 64, "test_size": 4},
            "training": training,
        }
        self.config.write_text(json.dumps(settings))  # which is YAML, too
        self.command = [
            sys.executable, str(ROOT / "train.py"), "--config", str(self.config), "--resume=auto",
        ]  # fmt: skip
        self.whole = self._whole()

    def _whole(self) -> bytes:
        """The adapter of a run that nothing disturbs; `usual` is how long it takes."""
        where = self.folder / "whole"
        ended(self.start(where))  # compiles for all that follow
        shutil.rmtree(where)
        began = time.monotonic()
        code, said = ended(self.start(where))
        self.usual = time.monotonic() - began
        if code:
            sys.exit(f"the run that nothing disturbs fails: {said}")
        return (where / "run" / ADAPTER).read_bytes()

    def start(self, where: Path, shell: str = '"$@"', **environment: str) -> subprocess.Popen[str]:
        """Start it, or start it again, in a folder.

        Args:
            where: the folder, made if it is missing.
            shell: what bash runs; `"$@"` is the command.
            environment: more variables.
        """
        where.mkdir(exist_ok=True)
        return subprocess.Popen(
            ["bash", "-c", shell, "faults", *self.command],
            cwd=where,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.folder / "cache")}
            | environment,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def finish(self, where: Path) -> str:
        """Start it once more, to the end; what is wrong with that."""
        code, said = ended(self.start(where))
        if code:
            return f"exit code {code}: {said[-300:]}"
        return self.differs((where / "run" / ADAPTER).read_bytes())

    def differs(self, adapter: bytes | None) -> str:
        """What is wrong with the adapter at the end."""
        return "" if adapter == self.whole else "the bytes at the end differ"


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code of a process, and what it said."""
    _, said = process.communicate(timeout=900)
    return process.returncode, said


def unclear(code: int, said: str, allowed: set[int]) -> str:
    """What is wrong with how a disturbed run ended."""
    if code not in allowed:
        return f"exit code {code}: {said[-300:]}"
    return f"a traceback: {said[-300:]}" if "Traceback" in said else ""


# What a run has done when it is disturbed.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "while it imports": lambda run: time.time() - run.parent.stat().st_mtime > 1,
    "when its folder is made": lambda run: run.exists(),
    "in the first step": lambda run: (run / "metrics.jsonl").exists(),
    "while saving": lambda run: any(run.glob("checkpoints/*tmp*")),
    "after a checkpoint": lambda run: (run / "checkpoints/14/run/metadata").exists(),
    "at the end": lambda run: (run / "adapter").exists(),
}


def signals(add: Add, folder: Path, count: int, seed: int) -> None:
    """Signals at named moments of a run, which is then continued."""
    run = Run(folder, steps=30)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"):
        number = getattr(signal, name)
        for moment, reached in MOMENTS.items():
            where = folder / f"{name} {moment}"
            process = run.start(where, 'exec "$@"')
            while not reached(where / "run") and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(number)
            code, said = ended(process)
            # By the signal itself before Python runs, and 0 where the run was over already.
            problem = unclear(code, said, {0, -number, 128 + number}) or run.finish(where)
            add(f"{name} to a run", problem and f"{moment}: {problem}")
            shutil.rmtree(where)


def disks(add: Add, folder: Path, count: int, seed: int) -> None:
    """A disk that gets full at any moment, which is then enlarged."""
    run, dice = Run(folder, steps=30), Random(seed)
    for number in range(max(4, count // 50)):
        where, size = folder / f"disk {number}", 4 * dice.randrange(1, 100)
        small = f'mount -t tmpfs -o size={size}k none "$PWD" && cd "$PWD" && '
        small += '"$@"; echo "exit code $?" >&2; mount -o remount,size=1g "$PWD"; '
        small += f'"$@" && cp run/{ADAPTER} "$COPY"'
        copy = folder / "copy"
        where.mkdir()
        alone = f"unshare --map-root-user --mount bash -c '{small}' faults \"$@\""
        process = run.start(where, alone, COPY=str(copy))
        code, said = ended(process)
        full = "exit code 2" in said or "exit code 0" in said
        problem = unclear(code, said, {0}) or ("" if full else said[-300:])
        problem = problem or run.differs(copy.read_bytes() if copy.exists() else None)
        add("full disk", problem and f"{size} KiB: {problem}")
        copy.unlink(missing_ok=True)


# Machines that a run may come back on, with the same rows in a step.
MACHINES = [
    (1, "training.per_device_train_batch_size=2 mesh.data=1"),
    (2, "training.per_device_train_batch_size=1 mesh.data=2"),
    (2, "training.per_device_train_batch_size=2 mesh.data=1 mesh.tensor=2"),
    (2, "training.per_device_train_batch_size=1 mesh.data=1 mesh.fsdp=2"),
]
# Reads what this start is on, tells its process id, and becomes the run.
ON_A_MACHINE = (
    '. ./machine; echo $$ > pid.new; mv pid.new pid; exec "$@" training.output_dir="$OUTPUT" $MESH'
)


def cloud(add: Add, folder: Path, minutes: float, seed: int) -> None:
    """Kills at random until the run ends, as often as there is time for.

    scripts/supervise.sh starts the run again, as on a spot machine. The output is a folder, or a
    folder of an emulated bucket, and then most new machines have no local copy of it. On some days
    each machine has other devices; the losses then agree as closely as sums in another order do.
    """
    run, dice, stop = Run(folder, steps=200), Random(seed), time.monotonic() + 60 * minutes
    losses = _losses((folder / "whole/run/metrics.jsonl").read_bytes())
    with _bucket() as url:
        number = 0
        while time.monotonic() < stop:
            where, changing = folder / f"day {number}", number % 3 == 2
            output = f"{url}/day-{number}" if url and dice.random() < 0.6 else "run"
            if problem := _day(add, run, where, output, changing, dice):
                add("the end of a run", f"{where.name}: {problem}")
            elif changing:
                found = _losses(_read(where, output, "metrics.jsonl") or b"")
                same = found.keys() == losses.keys() and all(
                    abs(found[step] / losses[step] - 1) < 1e-3 for step in losses
                )
                add("held-out losses, changing devices", "" if same else f"{where.name}: {found}")
            else:
                add("bytes at the end of a run", run.differs(_read(where, output, ADAPTER)))
            number += 1


def _day(add: Add, run: Run, where: Path, output: str, changing: bool, dice: Random) -> str:
    """One run with all its kills; what is wrong with its end."""
    cache = where / "cache"
    where.mkdir()
    _choose_machine(where, output, dice if changing else None)
    supervise = f"bash {ROOT}/scripts/supervise.sh bash -c '{ON_A_MACHINE}' run \"$@\" 2> said"
    variables = {"RESTART_SECONDS": "0", "XDG_CACHE_HOME": str(cache)}
    if not changing:  # several CPU devices compile anew, see `keep_compiled`
        variables["JAX_COMPILATION_CACHE_DIR"] = str(run.folder / "cache/phi3-jax/compiled")
    process = run.start(where, supervise, **variables)
    while (pid := _next_start(where, process)) is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(dice.expovariate(1 / run.usual))
        if process.poll() is not None:
            break
        number = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
        _choose_machine(where, output, dice if changing else None)
        (where / "pid").unlink()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            add(f"{number.name} at random, {'folder' if output == 'run' else 'bucket'}", "")
        if number == signal.SIGKILL and dice.random() < 0.7:  # a new machine
            _wait_for_end(pid)
            shutil.rmtree(cache / "phi3-jax/runs", ignore_errors=True)
    code, _ = ended(process)
    said = (where / "said").read_text(errors="replace")
    odd = set(said.split("supervise: exit code ")[1:])
    codes = {int(text.partition(";")[0]) for text in odd} - {137, 143, 129}
    return unclear(code, said, {0}) or (f"exit codes {codes}: {said[-300:]}" if codes else "")


def _choose_machine(where: Path, output: str, dice: Random | None) -> None:
    devices, mesh = dice.choice(MACHINES) if dice else (1, "")
    flags = f"--xla_force_host_platform_device_count={devices}"
    text = f'export XLA_FLAGS="{flags}" OUTPUT="{output}" MESH="{mesh}"\n'
    (where / "machine.new").write_text(text)
    (where / "machine.new").replace(where / "machine")


def _next_start(where: Path, process: subprocess.Popen[str]) -> int | None:
    """The process that was started last; None once supervise.sh has ended."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((where / "pid").read_text())
        time.sleep(0.01)
    return None


def _wait_for_end(pid: int) -> None:
    while Path(f"/proc/{pid}").exists() and not _is_zombie(pid):
        time.sleep(0.01)


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def _read(where: Path, output: str, name: str) -> bytes | None:
    if output != "run":
        return Bucket(output).read(name)
    file = where / "run" / name
    return file.read_bytes() if file.exists() else None


def _losses(metrics: bytes) -> dict[int, float]:
    """The held-out loss of each evaluation."""
    records: list[dict[str, Any]] = [json.loads(line) for line in metrics.splitlines()]
    return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}


@contextlib.contextmanager
def _bucket() -> Iterator[str]:
    """The URL of an emulated bucket; empty without the emulator."""
    try:
        import gcsfs  # noqa: F401 (which a run needs)
        from gcp_storage_emulator.server import create_server
    except ImportError:
        print("no bucket: pip install 'phi3-jax[emulators]'; all output goes to folders")
        yield ""
        return
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # of missing objects
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.server_address
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://{host}:{port}"
    try:
        yield "gs://bucket"
    finally:
        server.stop()
        fsspec.filesystem("gcs").clear_instance_cache()
