"""What no path of a config may be."""

from __future__ import annotations

import os
from typing import Any

# By section; `data.sources` has paths as well.
_KEYS = {
    "model": ("path",),
    "peft": ("adapter_name_or_path",),
    "data": ("path", "test_path", "chat_template_path", "cache_dir"),
    "training": ("output_dir",),
}


def path_problems(config: Any) -> list[str]:
    """The keys of a `RunConfig` whose path no system call takes."""
    paths = {
        f"{section}.{key}": getattr(getattr(config, section), key)
        for section, keys in _KEYS.items()
        for key in keys
    }
    paths |= {f"data.sources[{n}].path": s.path for n, s in enumerate(config.data.sources or ())}
    problems = []
    for key, path in paths.items():
        if path is None:
            continue
        if "\0" in path:
            problems.append(f"{key}: {path!r} has a null character, which no path may have")
        elif os.path.expanduser(path).startswith("~"):  # unchanged: pathlib raises RuntimeError
            user = path.partition("/")[0]
            problems.append(f"{key}: {path!r}: {user} has no home directory here; write it in full")
    return problems
