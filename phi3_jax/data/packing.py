"""Pack several examples into one row, by TRL's strategies.

`bfd` (best fit, longest first): each example goes into the row it fills the most, or opens a new
one. Examples are never split and never attend to each other (each is its own segment, with
positions from 0). The number of rows depends only on the lengths, so every epoch has the same
number of steps. `bfd_split` is the same after longer examples were split.

`wrapped`: the examples are written one after the other and cut into full rows, which ignores where
one ends and the next begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A part of an example: its index, and which of its tokens.
Part = tuple[int, int, int]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, by best-fit decreasing (Johnson 1973).

    Args:
        lengths: lengths of the examples; equal ones keep their order.
        capacity: row capacity in tokens.

    Raises:
        ValueError: an example is longer than a row.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"an example of {sizes.max()} tokens fits no row of {capacity}")
    rows: list[list[int]] = []
    # Rows keyed by free space; bit n of `rooms` is set if some row has n tokens free.
    by_room: dict[int, list[int]] = {}
    rooms = 0
    order = np.argsort(-sizes, kind="stable")
    for index, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        by_room.setdefault(room - length, []).append(row)
        rooms |= 1 << (room - length)
    return rows


def wrap(lengths: Sequence[int], capacity: int) -> list[list[Part]]:
    """Rows of `capacity` tokens, the last one maybe shorter, from examples in a row."""
    rows: list[list[Part]] = []
    room = 0
    for index, length in enumerate(lengths):
        start = 0
        while start < length:
            if not room:
                rows.append([])
                room = capacity
            taken = min(room, int(length) - start)
            rows[-1].append((index, start, start + taken))
            start, room = start + taken, room - taken
    return rows
