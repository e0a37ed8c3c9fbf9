"""The package's only exception, and the lists in its messages."""

from __future__ import annotations

from collections.abc import Iterable

# Characters of an item in a list of a message; a tensor may have a name of any length.
LONGEST = 1000


class LoraError(ValueError):
    """Bad input that the caller can fix: a config, a target, an adapter folder.

    The message says what is wrong, where, and what is available instead.
    """


def at_most_ten(items: Iterable[str]) -> list[str]:
    """The first ten of a message's items, and the number of the others; long ones are cut."""
    first, rest = (found := list(items))[:10], len(found) - 10
    first = [item if len(item) <= LONGEST else f"{item[:LONGEST]}..." for item in first]
    return [*first, f"and {rest} more"] if rest > 0 else first
