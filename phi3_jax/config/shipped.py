"""The YAML configs that ship with the package, found by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from phi3_jax.errors import UserError

FOLDER = Path(__file__).parents[1] / "configs"


def shipped_names() -> list[str]:
    """Names of the shipped configs, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def shipped_path(name: str) -> Path:
    """The file of a shipped config.

    Raises:
        UserError: there is no config of that name; names the nearest one.
    """
    names = shipped_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"shipped: {', '.join(names)}"
        raise UserError(f"{name}: no such config file, and no config of that name ships; {hint}")
    return FOLDER / f"{name}.yaml"


def find_config(path_or_name: str | Path) -> Path:
    """A file by its path, or a shipped config by its name; a file of that path comes first.

    Raises:
        UserError: neither exists.
    """
    path = Path(path_or_name)
    looks_like_a_path = path.suffix or len(path.parts) != 1
    if path.is_file() or looks_like_a_path:
        return path
    return shipped_path(str(path_or_name))


def describe_shipped() -> dict[str, str]:
    """For each shipped config its first comment, as one line."""
    found = {}
    for name in shipped_names():
        comment = []
        for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.removeprefix("#").strip())
        found[name] = " ".join(comment).partition(". ")[0].rstrip(".:")
    return found
