"""The YAML configs that ship with the package, looked up by name."""

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
        UserError: no config has this name; the message suggests the nearest one.
    """
    names = shipped_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"shipped configs: {', '.join(names)}"
        raise UserError(f"{name}: no such file, and no shipped config has this name; {hint}")
    return FOLDER / f"{name}.yaml"


def find_config(path_or_name: str | Path) -> Path:
    """The config file at a path, or the shipped config of that name; an existing file wins.

    Raises:
        UserError: neither exists.
    """
    path = Path(path_or_name)
    looks_like_a_path = path.suffix or len(path.parts) != 1
    if path.is_file() or looks_like_a_path:
        return path
    return shipped_path(str(path_or_name))


def describe_shipped() -> dict[str, str]:
    """The first sentence of each shipped config's opening comment."""
    found = {}
    for name in shipped_names():
        comment = []
        for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.removeprefix("#").strip())
        found[name] = " ".join(comment).partition(". ")[0].rstrip(".:")
    return found
