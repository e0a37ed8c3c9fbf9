"""What the runs of a test process have in common, done once: each would do it again in seconds."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import jax
from grain._src.python.dataset.transformations import shuffle
from jax._src import compiler

from phi3_jax.data import tokenizer


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Take a program from memory where this process has compiled the same one before.

    Each run traces functions of its own, which JAX compiles again. From memory, since a program
    over several CPU devices that comes from the cache on disk can deadlock. With a cache of its own
    on disk, a test sees what JAX does with it.
    """
    compile_anew, programs = compiler.compile_or_get_cached, {}
    folder = jax.config.jax_compilation_cache_dir

    def once(backend, computation, devices, options, host_callbacks, *rest, **named):
        def compiled():
            return compile_anew(
                backend, computation, devices, options, host_callbacks, *rest, **named
            )

        if host_callbacks or jax.config.jax_compilation_cache_dir != folder:
            return compiled()
        text = computation.operation.get_asm(enable_debug_info=False)
        digest = hashlib.sha256(text.encode() + options.SerializeAsString()).digest()
        key = (backend, digest, tuple(device.id for device in devices.flat))
        if key not in programs:
            programs[key] = compiled()
        return programs[key]

    compiler.compile_or_get_cached = once
    try:
        yield
    finally:
        compiler.compile_or_get_cached = compile_anew


def share_data_preparation() -> None:
    """Load a tokenizer once while its files are the same, and keep what Grain shuffles.

    Its shuffle permutes 65,536 numbers or more, and so walks through thousands for one of a few.
    """
    tokenizer.load_tokenizer = functools.wraps(_load)(_load_once)
    walk = functools.lru_cache(maxsize=2**16)(shuffle.index_shuffle.index_shuffle)
    shuffle.index_shuffle.index_shuffle = walk


_load = tokenizer.load_tokenizer
_loaded: dict = {}


def _load_once(directory, chat_template_path=None, add_tokens=()):
    if chat_template_path is not None or add_tokens:
        return _load(directory, chat_template_path, add_tokens)
    stats = [
        (path.name, path.stat()) for path in sorted(Path(directory).glob("*")) if path.is_file()
    ]
    key = (str(directory), *((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats))
    if key not in _loaded:
        _loaded[key] = _load(directory)
    return copy.copy(_loaded[key])  # with the attributes of its own that a caller may set
