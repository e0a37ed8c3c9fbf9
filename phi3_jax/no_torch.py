"""transformers and datasets import torch where it is installed; this program never uses it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import cast


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """While inside, libraries that look for torch do not find it.

    They look once, when they are imported, so a process that imports them here saves the seconds
    and the 150 MB that torch takes. A process that has imported torch keeps it.
    """
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    if "torch" in modules:
        yield
        return
    modules["torch"] = None
    try:
        yield
    finally:
        del modules["torch"]
