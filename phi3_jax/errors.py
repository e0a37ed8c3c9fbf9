"""Errors that the user can fix, the text of messages, and what to do about a failed write."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable

REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "the file would exceed the limit of the file system or of `ulimit -f`: raise it",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: change the folder's permissions or choose another one",
    errno.EPERM: "not permitted: change the folder's permissions or choose another one",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter one",
    errno.ENOTDIR: "there is a file where a folder should be: move it or choose another folder",
    errno.EEXIST: "there is a file where a folder should be: move it or choose another folder",
    errno.EISDIR: "there is a folder where a file should be: move it or choose another folder",
    errno.ELOOP: "a symbolic link leads back to itself: remove it",
    errno.EIO: "the disk or the connection to it failed: check it",
    errno.ESTALE: "the network folder is no longer mounted: mount it again",
}
# Everything that a terminal acts on, line feed and tab apart, right-to-left overrides included,
# and lone surrogates, which cannot be written.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# Characters of an item in a list of a message; a tensor may have a name of any length.
LONGEST = 1000


class UserError(ValueError):
    """Bad input: a config, a data row, a checkpoint, an adapter, a token id.

    The message says what is wrong, where, and how to fix it. `phi3-jax` prints it without a
    traceback and exits with code 2.
    """


def storage_problem(error: BaseException) -> str | None:
    """What to do about a failed read or write: one line with its path; None for other errors.

    Args:
        error: an OSError, or the error of a library that was raised from one or quotes its text.
    """
    if isinstance(error, OSError) and error.errno in REMEDIES:
        path = f"{error.filename}: " if error.filename else ""
        return f"{path}{REMEDIES[error.errno]}"
    cause = error.__cause__ or error.__context__
    if cause is not None and (found := storage_problem(cause)):
        return found
    if isinstance(error, OSError):
        return None
    text = str(error)  # tensorstore quotes the system's text
    names = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}
    names |= {errno.EFBIG: "File too large", errno.EROFS: "Read-only file system"}
    names |= {errno.EACCES: "Permission denied"}
    return next((REMEDIES[code] for code, quoted in names.items() if quoted in text), None)


def machine_problem(error: Exception) -> str | None:
    """What to do about errors of Python and JAX about paths, memory and devices, or None."""
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop from "):
        return f"{text.removeprefix('Symlink loop from ')}: {REMEDIES[errno.ELOOP]}"
    if isinstance(error, RuntimeError) and text.startswith("Could not determine home directory"):
        return "a path begins with ~, but that user has no home directory here: write it in full"
    if isinstance(error, ValueError) and text == "embedded null byte":
        return "a path has a null character: choose another one"
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
        return f"JAX_PLATFORMS: {' '.join(text.split())}"
    if isinstance(error, MemoryError) or text.startswith("RESOURCE_EXHAUSTED: Out of memory"):
        said = text.removeprefix("RESOURCE_EXHAUSTED: ").partition("\n")[0]
        return (
            f"not enough memory ({said or 'out of memory'}): use smaller batches or "
            "shorter rows, or a machine with more memory"
        )
    return None


def at_most_ten(items: Iterable[str]) -> list[str]:
    """The first ten of a message's items, and the number of the others; long ones are cut."""
    first, rest = (found := list(items))[:10], len(found) - 10
    first = [item if len(item) <= LONGEST else f"{item[:LONGEST]}..." for item in first]
    return [*first, f"and {rest} more"] if rest > 0 else first


def printable(text: str) -> str:
    r"""Text as a terminal may get it: control characters as escapes such as `\x1b`.

    Names, rows and answers can hold sequences that move the cursor or set the window's title.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
