"""The end of a sweep: the adapters, and the comparison of its members."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax

import lora_flax
from phi3_jax.buckets import scheme_of
from phi3_jax.sharding.processes import is_first
from phi3_jax.training.optimizer import update_counts
from phi3_jax.training.output import export_adapter
from phi3_jax.training.progress import NonFiniteError
from phi3_jax.training.setup import Setup
from phi3_jax.training.sweep.progress import Sweep


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The result of a finished sweep.

    Attributes:
        adapters: folder of each member's PEFT adapter, keyed by name; a member that stopped early
            or whose steps were all skipped has none.
        losses: held-out loss of each of them after the last step, or its training loss if nothing
            is held out.
        best: name of the member with the lowest loss.
        stopped: the step after which a member stopped early, keyed by name.
    """

    adapters: dict[str, Path]
    losses: dict[str, float]
    best: str
    stopped: dict[str, int]


def trained_members(sweep: Sweep) -> list[int]:
    """The members that took the last step, and were not skipped in every one.

    Raises:
        NonFiniteError: there is none.
    """
    updated = lora_flax.on_host(update_counts(sweep.state.opt_state)) > 0
    trained = [index for index in sweep.active() if updated[index] or not sweep.step]
    if not trained:
        raise NonFiniteError(
            f"every one of the {sweep.step} steps of every member had a loss or gradient that is "
            "not finite: nothing was trained, and no adapter is written. Lower the learning rates, "
            "use model.dtype bfloat16 or float32, or check the data"
        )
    return trained


def compare(sweep: Sweep, trained: Sequence[int], adapters: dict[str, Path]) -> SweepResult:
    """The losses of the members that were trained to the end, the best first.

    Args:
        sweep: after its last step.
        trained: these members, from `trained_members`.
        adapters: what was written of them.
    """
    losses = {}
    for index in trained:
        known = sweep.evaluations[index].get(sweep.step, {})
        losses[sweep.members[index].name] = known.get("eval_loss", sweep.losses[index])
    order = sorted(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
    stopped = {sweep.members[index].name: step for index, step in sweep.stopped.items()}
    return SweepResult(adapters, {name: losses[name] for name in order}, order[0], stopped)


def export(sweep: Sweep, many: lora_flax.Many, setup: Setup, output: Path) -> SweepResult:
    """Write every adapter and sweep.json with the comparison, and report the best.

    Args:
        sweep: after its last step.
        many: the adapters before the first step.
        setup: the run's setup.
        output: the sweep's folder.

    Raises:
        NonFiniteError: every step of every remaining member was skipped.
    """
    many = dataclasses.replace(
        many, trainable=jax.tree.map(lora_flax.on_host, sweep.state.trainable)
    )
    trained = trained_members(sweep)
    adapters, notes = {}, set()
    for index in trained:
        member, known = sweep.members[index], sweep.evaluations[index]
        lora_flax.put_one(setup.model, many, index)
        folder = output / member.name
        adapter = folder / "adapter"
        step, record = sweep.step, sweep.record.as_dict()
        notes.add(export_adapter(setup, member.config, adapter, step, known, folder, record))
        adapters[member.name] = adapter
    result = compare(sweep, trained, adapters)
    _write_comparison(sweep, result, trained, output)
    for note in sorted(filter(None, notes)):
        sweep.terminal.print(note)
    return result


def _write_comparison(
    sweep: Sweep, result: SweepResult, trained: Sequence[int], output: Path
) -> None:
    """Write sweep.json, and print it."""
    rows = []
    what = "loss" if sweep.held_out is None else "eval_loss"
    where = _places(sweep, result)
    for name, loss in result.losses.items():
        rows.append({"name": name, what: _known(loss), "adapter": where[name]})
        mark = "best" if name == result.best else "    "
        sweep.terminal.print(f"{mark}  {what} {loss:.4f}  {name}")
    for index, member in enumerate(sweep.members):
        if (stop := sweep.stopped.get(index)) is not None:
            loss = sweep.evaluations[index][stop]["eval_loss"]
            rows.append({"name": member.name, what: _known(loss), "adapter": None, "stopped": stop})
            sweep.terminal.print(
                f"      {what} {loss:.4f}  {member.name}, stopped after step {stop}"
            )
        elif index not in trained:
            rows.append({"name": member.name, what: None, "adapter": None})
            sweep.terminal.print(f"{member.name}: every step was skipped, so it has no adapter")
    summary = {"best": result.best, "members": rows}
    if is_first():
        lora_flax.write_atomically(output / "sweep.json", json.dumps(summary, indent=2) + "\n")
    sweep.terminal.print(f"adapter: {where[result.best]}")


def _places(sweep: Sweep, result: SweepResult) -> dict[str, str]:
    """Where each adapter is found: in the bucket, if the folder is copied to one."""
    configured = {m.name: m.config.training.output_dir for m in sweep.members}
    return {
        name: f"{configured[name]}/adapter" if scheme_of(configured[name]) else str(adapter)
        for name, adapter in result.adapters.items()
    }


def _known(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
