"""Atomic file writes: all or nothing, and on disk once the call returns."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

Buffer = bytes | bytearray | memoryview


def write_atomically(path: str | os.PathLike[str], content: str | bytes | Iterable[Buffer]) -> None:
    """Writes a file under a temporary name, then renames it.

    A crash leaves either the old file or the new one. The file is synced before the rename and its
    folder after it, so the written data also survives a power failure.

    Args:
        path: path of the file, in an existing folder.
        content: text (written as UTF-8), bytes, or pieces that are written one by one, so a large
            file never has to fit in memory.

    Raises:
        OSError: if the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    pieces: Iterable[Buffer] = (content,) if isinstance(content, bytes) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a failed write has none, and the temporary name helps nobody
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_durably(path: str | os.PathLike[str]) -> None:
    """Removes a file, if it exists; it is gone from the disk before anything is written after it.

    Raises:
        OSError: if the file cannot be removed.
    """
    path = Path(path)
    path.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable if the system can open a folder (Windows cannot)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
