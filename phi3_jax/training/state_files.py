"""One checkpoint on disk: a record, and the blocks that each process wrote by Orbax.

    STEP/run/metadata       identity of the run, layout and digest of every array; written last
    STEP/state/0, 1, ...    Orbax checkpoints, one a process, each holding the blocks it wrote

A file system may return other bytes than were written. Every array therefore has a digest in the
record, and the record has one of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

import lora_flax
from phi3_jax.errors import UserError, at_most_ten, storage_problem
from phi3_jax.training.shards import Index, Layout, overlap, shape_of, slices_in

_STEP = re.compile("[1-9][0-9]*")
# The folder of a run's checkpoints, and in one of them the record and the processes' parts.
CHECKPOINTS = "checkpoints"
RECORD = "run/metadata"
STATE = "state"
# The layout described above. Number 1, whole arrays in `state`, had no number.
FORMAT = 2


class Damaged(UserError):
    """A checkpoint whose files are incomplete or changed."""


def damaged(folder: Path, problem: str) -> Damaged:
    """The error about a checkpoint and what is wrong with it."""
    return Damaged(f"{folder}: damaged, cannot be restored ({problem})")


def saved_steps(folder: Path) -> list[int]:
    """The steps with a complete checkpoint in the folder, in order; damage is not looked for."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if _STEP.fullmatch(path.name))


def temporary(folder: Path, step: int) -> Path:
    """Where a checkpoint is written until it is complete."""
    return folder / f"{step}.orbax-checkpoint-tmp"


def start_part(
    folder: Path, step: int, process: int, arrays: Mapping[str, jax.Array | np.ndarray]
) -> Callable[[], Path]:
    """Start to write the blocks of one process.

    Args:
        folder: the checkpoints of the run.
        step: steps taken so far.
        process: the number of this process.
        arrays: arrays of which it writes a block; once this returns, they have been copied to the
            host, and a step may reuse their memory.

    Returns:
        What waits until the blocks are on disk, and returns their folder.

    Raises:
        Exception: of Orbax or its storage, which raise many types; so does what is returned.
    """
    part = temporary(folder, step) / STATE / str(process)
    part.parent.mkdir(parents=True, exist_ok=True)
    checkpointer = _checkpointer(process)
    checkpointer.save(part, args=ocp.args.PyTreeSave(dict(arrays)))

    def finish() -> Path:
        try:
            checkpointer.wait_until_finished()
        finally:
            checkpointer.close()
        _sync(part)
        return part

    return finish


def commit(folder: Path, step: int, record: Mapping[str, Any]) -> None:
    """Give a checkpoint its record and its name, once all parts are on disk.

    Raises:
        OSError: it cannot be written.
    """
    unfinished_one = temporary(folder, step)
    file = unfinished_one / RECORD
    file.parent.mkdir()
    lora_flax.write_atomically(file, json.dumps(_signed({**record, "step": step})))
    _sync(unfinished_one)
    os.replace(unfinished_one, folder / str(step))
    _sync_one(folder)


def rewrite_record(folder: Path, step: int, record: dict[str, Any]) -> None:
    """Replace the record of a checkpoint; its arrays stay."""
    lora_flax.write_atomically(folder / str(step) / RECORD, json.dumps(_signed(record)))


def read_record(folder: Path, step: int) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        Damaged: it is missing, changed, or that of another step.
        UserError: another version of the program wrote it.
    """
    where = folder / str(step)
    if (where / RECORD).exists() and not (where / RECORD).is_file():  # a FIFO would never end
        raise damaged(where, f"{RECORD} is not a regular file")
    try:
        record: dict[str, Any] = json.loads((where / RECORD).read_bytes())
        sound = record["digest"] == _signed(record)["digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _refuse_unreadable(where, error)
        raise damaged(where, f"{RECORD}: {first_line(error)}") from None
    if not sound:
        raise damaged(where, f"{RECORD} differs from its digest")
    if (found := record.get("format", 1)) != FORMAT:
        raise UserError(
            f"{where}: another version of phi3-jax wrote this checkpoint (format {found}; this "
            f"version reads format {FORMAT}). Finish the run with that version, or start a new one "
            "in another training.output_dir"
        )
    if record["step"] != step:
        raise damaged(where, f"it holds step {record['step']}; the folder was renamed")
    return record


def saved_records(folder: Path) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """The record of each saved step, and what is wrong with those that are damaged."""
    records, damages = {}, {}
    for step in saved_steps(folder):
        try:
            records[step] = read_record(folder, step)
        except Damaged as error:
            damages[step] = str(error)
    return records, damages


def layouts_of(record: Mapping[str, Any]) -> dict[str, Layout]:
    """The layout of every array, by name."""
    return {name: Layout.from_json(saved) for name, saved in record["arrays"].items()}


def read_blocks(
    folder: Path, record: Mapping[str, Any], wanted: Mapping[str, list[Index]]
) -> dict[str, dict[Index, np.ndarray]]:
    """Blocks of the arrays of a checkpoint, whatever blocks it was written in.

    Only the saved blocks that overlap them are read. Nothing is compared with the digests, which
    are those of whole arrays.

    Args:
        folder: the checkpoints of the run.
        record: from `read_record`.
        wanted: the blocks to read, by the name of the array.

    Raises:
        Damaged: a block is missing or cannot be read.
    """
    where, layouts = folder / str(record["step"]), layouts_of(record)
    if missing := [name for name in wanted if name not in layouts]:
        raise damaged(where, f"no array {', '.join(at_most_ten(map(repr, missing)))}")
    found: dict[str, dict[Index, np.ndarray]] = {}
    unreadable: dict[str, str] = {}
    context = tensorstore.Context()  # of its own: nothing cached of files that were replaced
    for name, indices in wanted.items():
        try:
            found[name] = _read_array(where / STATE, name, layouts[name], indices, context)
        except Exception as error:  # tensorstore raises many types for damaged files
            _refuse_unreadable(where, error)
            unreadable[name] = first_line(error)
    if unreadable:
        names = ", ".join(at_most_ten(map(repr, unreadable)))
        plural = "s" if len(unreadable) > 1 else ""
        raise damaged(where, f"the array{plural} {names}: {next(iter(unreadable.values()))}")
    return found


def _read_array(
    state: Path, name: str, layout: Layout, indices: list[Index], context: tensorstore.Context
) -> dict[Index, np.ndarray]:
    """Blocks of one array, each put together from the saved blocks that it overlaps."""
    dtype = np.dtype(layout.dtype)
    blocks = {index: np.zeros(shape_of(index), dtype) for index in indices}
    opened: dict[int, tensorstore.TensorStore] = {}
    for shard in layout.shards:
        for index, block in blocks.items():
            if (both := overlap(index, shard.index)) is None:
                continue
            if shard.process not in opened:
                part = state / str(shard.process)
                opened[shard.process] = _open_array(part, name, layout, context)
            whole = opened[shard.process][tuple(slice(*axis) for axis in both)]
            block[slices_in(index, both)] = whole.read().result()
    return blocks


def _open_array(
    part: Path, name: str, layout: Layout, context: tensorstore.Context
) -> tensorstore.TensorStore:
    """An array of one process's part, as Orbax writes it."""
    store = tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{part}/", "path": f"{name}/"},
            "fill_missing_data_reads": False,
        },
        open=True,
        read=True,
        context=context,
    ).result()
    shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
    if (shape, dtype) != (layout.shape, np.dtype(layout.dtype)):
        raise ValueError(f"it has the shape {shape} and the type {dtype}")
    return store


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


def _checkpointer(process: int) -> ocp.AsyncCheckpointer:
    # Every part is told that this process is alone, or it would wait for the others of the run.
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    own_blocks = ocp.type_handlers.ArrayHandler(
        primary_host=None,
        replica_id=0,
        use_replica_parallel=False,
        enable_write_sharding_file=False,
        array_metadata_store=None,
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, own_blocks), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=alone, type_handler_registry=registry
    )
    # Orbax would wait for a thread that creates the folder, by a key that all processes share. The
    # first to finish deletes it, and the others would wait forever.
    at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(handler, multiprocessing_options=alone, async_options=at_once)


def _signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the digest of all else in it."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True)
    return rest | {"digest": hashlib.sha256(text.encode()).hexdigest()}


def _sync(folder: Path) -> None:
    """Put every file and folder on disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
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


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its text."""
    lines = str(error).strip().splitlines() or [""]
    # tensorstore adds its whole configuration.
    return f"{type(error).__name__}: {lines[0].partition(' [tensorstore_spec=')[0]}"
