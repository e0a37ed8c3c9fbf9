"""Successive halving: which members of a sweep stop early (Jamieson & Talwalkar 2016)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from phi3_jax.config.sections import SweepConfig
from phi3_jax.errors import UserError

# Held-out metrics of a member, keyed by the step they were measured after.
Evaluations = Mapping[int, Mapping[str, float]]


def stopped_after(
    sweep: SweepConfig, names: Sequence[str], evaluations: Sequence[Evaluations], step: int
) -> dict[int, int]:
    """The members that have stopped by a step, and the step after which each did.

    At each step of `sweep.stop`, the share `sweep.keep` of those still in training continues,
    rounded up: those with the lowest held-out losses. It follows from the evaluations
    alone, so that an interrupted sweep stops the same members.

    Args:
        sweep: the section of the config.
        names: the members' names.
        evaluations: the members' held-out metrics.
        step: steps taken; one of `sweep.stop` that was not evaluated yet stops no member.

    Raises:
        UserError: the metrics of an earlier step are missing.
    """
    stopped: dict[int, int] = {}
    for stop in (at for at in sweep.stop if at <= step):
        running = [index for index in range(len(names)) if index not in stopped]
        if missing := [index for index in running if stop not in evaluations[index]]:
            if stop == step:
                break
            raise UserError(
                f"sweep.stop: the held-out loss of {names[missing[0]]} after step {stop} is not in "
                "its metrics.jsonl, so that nobody knows which members stopped there. Restore the "
                "file, or start the sweep again in another training.output_dir"
            )
        ranks = [(*_rank(evaluations[index][stop]["eval_loss"]), index) for index in running]
        for *_, index in sorted(ranks)[kept(len(running), sweep.keep) :]:
            stopped[index] = stop
    return stopped


def kept(count: int, share: float) -> int:
    """How many of `count` members go on: the share of them, rounded up."""
    return max(1, math.ceil(count * share - 1e-9))


def _rank(loss: float) -> tuple[bool, float]:
    """Sorts losses, those that are not finite last."""
    finite = math.isfinite(loss)
    return not finite, loss if finite else 0.0
