"""Streamed data in a run: what each process reads, and where all of them are in a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Set
from typing import Any

import jax
from jax.sharding import Mesh

import lora_flax
from phi3_jax.advice.clock import StepClock
from phi3_jax.advice.lengths import filling
from phi3_jax.advice.start import look_ahead, rate_line
from phi3_jax.data.batches import Batches, BatchPlan
from phi3_jax.data.row_streams import Share
from phi3_jax.data.stream_batches import Rows, StreamBatches, open_batches
from phi3_jax.errors import UserError
from phi3_jax.sharding.mesh import batch_sharding
from phi3_jax.sharding.processes import from_all
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.setup import Prepared, Setup


def batches_of(
    prepared: Prepared, plan: BatchPlan
) -> contextlib.AbstractContextManager[Batches | StreamBatches]:
    """The batches of a run's training data, on this process."""
    rows = rows_of_process(prepared.mesh, plan.train_rows)
    return open_batches(prepared.train, plan, prepared.config.training.seed, rows)


def advise(
    setup: Setup, adapter: lora_flax.Report, plan: BatchPlan, batches: Batches | StreamBatches
) -> tuple[str, StepClock]:
    """What is worth knowing before a run starts, and the clock of its steps (`look_ahead`).

    How much data a stream has is not known, and its steps are estimated by its first rows.
    """
    config, width = setup.config, setup.checkpoint.config.hidden_size
    if isinstance(batches, Batches):
        return look_ahead(config, width, adapter, setup.train.report, batches)
    first = filling(plan.train_batches(setup.train.examples, config.training.seed))
    line = rate_line(config.training.learning_rate, width, config.peft.to_lora())
    return line, StepClock(first.positions)


def rows_of_process(mesh: Mesh, count: int) -> Rows:
    """The rows of a global micro-batch that this process's devices hold, as a share of the data.

    Processes whose devices hold the same rows read the same share. Where rows are not divided
    evenly, every process reads all of them.

    Args:
        mesh: the mesh.
        count: rows of the micro-batch.
    """
    held: dict[int, set[int]] = {}
    shape = (count, mesh.shape["sequence"])  # a row may be cut along its tokens
    device: Any
    for device, (part, _) in batch_sharding(mesh).devices_indices_map(shape).items():
        held.setdefault(device.process_index, set()).update(range(count)[part])
    return divide_rows(held, jax.process_index(), count)


def divide_rows(held: Mapping[int, Set[int]], process: int, count: int) -> Rows:
    """`rows_of_process` by what each process holds."""
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    size = len(parts[0])
    if sorted(row for part in parts for row in part) != list(range(count)) or any(
        len(part) != size for part in parts
    ):
        return Rows(Share(), tuple(range(count)))
    places = {row: number for part in parts for number, row in enumerate(part)}
    index = parts.index(tuple(sorted(held[process])))
    return Rows(Share(index, len(parts)), tuple(places[row] for row in range(count)))


def position_of_all(batches: Batches | StreamBatches, step: int) -> dict[str, Any] | None:
    """Where the data of a step begins in all shares, for a checkpoint; None without a stream.

    With several processes, all of them must call this.
    """
    if isinstance(batches, Batches):
        return None
    found = from_all({"share": batches.share.index, "position": batches.position(step)})
    shares = {str(one["share"]): one["position"] for one in found}
    return {"count": batches.share.count, "shares": shares}


def find_position(batches: Batches | StreamBatches, checkpoints: Checkpoints, step: int) -> None:
    """Let a stream go on where it was when a step was saved.

    Raises:
        UserError: the data was read in another number of shares.
    """
    if isinstance(batches, Batches) or not step:
        return
    saved = checkpoints.position(step)
    if saved["count"] != batches.share.count:
        raise UserError(
            f"{checkpoints.directory / str(step)}: its data was streamed in {saved['count']} "
            f"shares and is now in {batches.share.count}; resume on as many hosts as before"
        )
    batches.seek(step, saved["shares"][str(batches.share.index)])
