"""Pack several examples into one row: best fit, longest first.

Each example goes into the row it fills the most, or opens a new one. Examples are never split and
never attend to each other (each is its own segment, with positions from 0). The number of rows
depends only on the lengths, so every epoch has the same number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, by best-fit decreasing (Johnson 1973).

    Args:
        lengths: lengths of the examples; equal ones keep their order.
        capacity: row capacity in tokens.

    Raises:
        ValueError: an example is longer than a row.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"an example of {max(lengths)} tokens fits no row of {capacity}")
    rows: list[list[int]] = []
    # Rows keyed by free space; bit n of `rooms` is set if some row has n tokens free.
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
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
