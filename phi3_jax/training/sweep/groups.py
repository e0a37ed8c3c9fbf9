"""Which members of a sweep take a step together: those with rows of one shape.

No member then works on the padding that another's longer rows would need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from phi3_jax.data.batches import Batch

# Tokens that a CPU processes at once, over all members of a group.
CPU_TOKENS = 1024


class Group(NamedTuple):
    """Members that take a step together, and their rows.

    Attributes:
        members: their numbers.
        batch: `[..., B, S]` if they share it, as those with one seed do; else with a leading axis,
            one entry for each.
    """

    members: list[int]
    batch: Batch


def grouped(members: Sequence[int], batches: Sequence[Batch], devices: int = 1) -> list[Group]:
    """Groups of members with rows of one shape, as many together as pays off here.

    An accelerator reads the base once for all of them. A CPU is compute-bound from about a thousand
    tokens on, and the activations of more would only leave its cache, so there the members follow
    one another, each in the program of a run alone.

    Args:
        members: their numbers.
        batches: the batch of each.
        devices: number of devices, or groups of devices, that the members are spread over.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for place, batch in enumerate(batches):
        by_shape.setdefault(batch["tokens"].shape, []).append(place)
    groups = []
    for shape, places in by_shape.items():
        tokens, platform = shape[-2] * shape[-1], jax.default_backend()
        size = devices * members_per_device(len(places), devices, tokens, platform)
        for first in range(0, len(places), size):
            chosen = places[first : first + size]
            own = [batches[place] for place in chosen]
            groups.append(Group([members[place] for place in chosen], _joined(own)))
    return groups


def members_per_device(members: int, devices: int, tokens: int, platform: str) -> int:
    """How many members take a step together on each device, or each group of devices.

    Args:
        members: number of members.
        devices: as in `grouped`.
        tokens: of one member's micro-batch.
        platform: kind of the devices.
    """
    each = -(-members // devices)
    return each if platform != "cpu" else min(each, max(1, CPU_TOKENS // tokens))


def _joined(batches: list[Batch]) -> Batch:
    first = batches[0]
    if all(batch is first for batch in batches):
        return first
    return {name: np.stack([batch[name] for batch in batches]) for name in first}
