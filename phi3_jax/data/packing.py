"""Several examples in one row: best fit, the longest first.

Each example goes into the row that it fills most, or opens one. No example is cut, none sees
another (they are segments of their own, positions from 0), and how many rows there are follows from
the lengths alone, so every epoch has as many steps.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, by best-fit decreasing (Johnson 1973).

    Args:
        lengths: of the examples; equal ones keep their order.
        capacity: of a row, in tokens.

    Raises:
        ValueError: an example is longer than a row.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"an example of {max(lengths)} tokens fits no row of {capacity}")
    rows: list[list[int]] = []
    # Which rows have how much room; bit n of `rooms` says that some row has room for n more.
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
