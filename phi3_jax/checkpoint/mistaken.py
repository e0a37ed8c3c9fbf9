"""What a path is that was given in place of a model, an adapter, or a run: hints for messages."""

from __future__ import annotations

from pathlib import Path

from phi3_jax.checkpoint.vocabulary import ADAPTER_CONFIG


def is_run(folder: Path) -> bool:
    """Whether it is the output folder of a run."""
    return (folder / "config.yaml").is_file() and any(
        (folder / name).exists() for name in ("checkpoints", "adapter", "metrics.jsonl")
    )


def hint(path: Path) -> str | None:
    """What a path is, and what to give instead of it; None if that cannot be told."""
    if path.is_file():
        return f"{path} is a file; give its folder, {path.parent}"
    if _is_sweep(path):
        return f"{path} is a sweep's folder; {_members(path)}"
    if is_run(path):
        if (path / "adapter" / ADAPTER_CONFIG).is_file():
            return f"{path} is a run's folder; its adapter is {path / 'adapter'}"
        return (
            f"{path} is the folder of a run that has not written its adapter yet; `phi3-jax export "
            f"--run {path} --format peft --output FOLDER` makes one of its last checkpoint"
        )
    checkpoint = path.parent.name == "checkpoints" and path.name.isdecimal()
    run = path.parent.parent if checkpoint else path.parent
    if checkpoint or (path.name == "checkpoints" and is_run(run)):
        what = "a checkpoint" if checkpoint else "the checkpoints"
        if _is_sweep(run):
            return f"{path} is {what} of a sweep, with all of its adapters; {_members(run)}"
        step = path.name if checkpoint else "N"
        return (
            f"{path} is {what} of a run, not a PEFT adapter or a model; `phi3-jax export --run "
            f"{run} --step {step} --format peft --output FOLDER` makes an adapter of it"
        )
    if (path / ADAPTER_CONFIG).is_file():
        return f"{path} is a PEFT adapter; give it as the adapter (--adapter)"
    if (path / "config.json").is_file():
        return f"{path} is a model; give it as the model (--model)"
    return None


def _is_sweep(folder: Path) -> bool:
    """Whether it is the output folder of a sweep: its members have folders of their own."""
    return is_run(folder) and any(is_run(file.parent) for file in folder.glob("*/config.yaml"))


def _members(sweep: Path) -> str:
    """Where the adapters of a sweep are."""
    for file in sorted(sweep.glob(f"*/adapter/{ADAPTER_CONFIG}")):
        return f"its adapters are in its members' folders, such as {file.parent}"
    return "its adapters are written when it ends (`phi3-jax train --resume`)"
