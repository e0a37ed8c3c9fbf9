"""One checkpoint on disk: the arrays of a run and a record, written by Orbax, with digests.

A file system may return other bytes than were written. Every array therefore has a SHA-256 in the
record, and the record has one of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

import lora_flax
from phi3_jax.errors import UserError, storage_problem

_STEP = re.compile("[1-9][0-9]*")
# The folder of a run's checkpoints, and the record in one, where Orbax puts the JSON item `run`.
CHECKPOINTS = "checkpoints"
RECORD = "run/metadata"


class Damaged(UserError):
    """A checkpoint whose files are incomplete or changed."""

    def __init__(self, folder: Path, problem: str):
        super().__init__(f"{folder}: damaged, cannot be restored ({problem})")


def saved_steps(folder: Path) -> list[int]:
    """The steps with a complete checkpoint in the folder, in order; damage is not looked for."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if _STEP.fullmatch(path.name))


def write_checkpoint(
    folder: Path, step: int, arrays: dict[str, np.ndarray], record: dict[str, Any]
) -> None:
    """Write `folder/STEP`; it appears under that name once it is complete and on disk.

    Args:
        folder: the checkpoints of the run.
        step: steps taken so far.
        arrays: what to save, by name.
        record: what else belongs to the checkpoint, as JSON values.

    Raises:
        UserError: the checkpoint cannot be written; nothing of it is left.
    """
    record = record | {"step": step, "arrays": {name: _digest(a) for name, a in arrays.items()}}
    target = folder / str(step)
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(
                target,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    run=ocp.args.JsonSave(_signed(record)),
                ),
            )
        _sync(target)
    except Exception as error:  # Orbax and its storage raise many types
        for left in (target, *unfinished(folder)):
            shutil.rmtree(left, ignore_errors=True)
        problem = storage_problem(error) or _first_line(error)
        kept = saved_steps(folder)
        last = f"the checkpoint of step {kept[-1]} is intact" if kept else "none was saved before"
        raise UserError(
            f"{target}: the checkpoint cannot be written: {problem}, then continue with --resume "
            f"({last})"
        ) from None


def rewrite_record(folder: Path, step: int, record: dict[str, Any]) -> None:
    """Replace the record of a checkpoint; its arrays stay."""
    kept = {name: value for name, value in record.items() if name != "digest"}
    lora_flax.write_atomically(folder / str(step) / RECORD, json.dumps(_signed(kept)))


def read_record(folder: Path, step: int) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        Damaged: it is missing, changed, or that of another step.
    """
    where = folder / str(step)
    try:
        record: dict[str, Any] = json.loads((where / RECORD).read_bytes())
        if record["digest"] != _signed(record)["digest"]:
            raise Damaged(where, f"{RECORD} differs from its digest")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        _refuse_unreadable(where, error)
        raise Damaged(where, f"{RECORD}: {_first_line(error)}") from None
    if record["step"] != step:
        raise Damaged(where, f"it holds step {record['step']}; the folder was renamed")
    return record


def read_arrays(
    folder: Path, record: dict[str, Any], like: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, each checked against its digest.

    Args:
        folder: the checkpoints of the run.
        record: from `read_record`.
        like: arrays with the expected names, shapes and dtypes.

    Raises:
        Damaged: an array is missing, changed or not finite.
    """
    where = folder / str(record["step"])
    try:
        with _checkpointer() as checkpointer:
            state = ocp.args.StandardRestore(like)
            found = checkpointer.restore(where, args=ocp.args.Composite(state=state))["state"]
    except Exception as error:  # Orbax and its storage raise many types for damaged files
        _refuse_unreadable(where, error)
        raise Damaged(where, _first_line(error)) from None
    arrays = {name: np.asarray(found[name]) for name in like}
    for name, array in arrays.items():
        if _digest(array) != record["arrays"].get(name):
            raise Damaged(where, f"the array {name!r} differs from its digest")
        if array.dtype.kind not in "iub" and not np.isfinite(array.astype(np.float32)).all():
            raise Damaged(where, f"the array {name!r} is not finite")
    return arrays


def set_aside(folder: Path, step: int) -> Path:
    """Rename a checkpoint so that no run takes it; returns its new path."""
    names = (f"{step}.damaged" + (f".{n}" if n else "") for n in range(1000))
    target = next(folder / name for name in names if not (folder / name).exists())
    os.replace(folder / str(step), target)
    return target


def remove(folder: Path, step: int) -> None:
    """Delete a checkpoint; killed halfway, it leaves nothing under its name."""
    old = folder / f"{step}.orbax-checkpoint-tmp-removed"
    os.replace(folder / str(step), old)
    shutil.rmtree(old, ignore_errors=True)


def unfinished(folder: Path) -> list[Path]:
    """What a run that was killed while saving left in the folder."""
    return [path for path in folder.iterdir() if ".orbax-checkpoint-tmp" in path.name]


def _checkpointer() -> Any:
    # Every part is told, or it would wait for the other processes of the run.
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        state=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        run=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _digest(array: np.ndarray) -> str:
    about = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(about + np.ascontiguousarray(array).tobytes()).hexdigest()


def _signed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the digest of all else in it."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True)
    return rest | {"digest": hashlib.sha256(text.encode()).hexdigest()}


def _sync(folder: Path) -> None:
    """Put every file and folder on disk, the parent folder last."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refuse_unreadable(where: Path, error: Exception) -> None:
    """Raise UserError where the files may be sound but this user cannot read them."""
    problem = storage_problem(error) or ""
    if "permission" in problem or "mount" in problem:
        raise UserError(f"{where}: cannot be read: {problem}") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
