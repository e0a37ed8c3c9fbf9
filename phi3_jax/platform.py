"""Choices that depend on the device: dtypes, attention and matmul kernels, compilation cache."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

import lora_flax
from phi3_jax.config.data import DataConfig
from phi3_jax.config.sections import ModelConfig
from phi3_jax.errors import UserError
from phi3_jax.model.attention import MULTIPLES, Implementation
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3
from phi3_jax.model.sequence import PIECES

# libtpu holds a lock on this file while it uses the chips.
LIBTPU_LOCK = Path("/tmp/libtpu_lockfile")
# The mask for packed rows grows quadratically with length; past this, `auto` uses blocks.
CUDNN_MASK_BYTES = 2**30
_ZSTANDARD = bytes.fromhex("28b52ffd")  # how its frames begin


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/phi3-jax`, or `~/.cache/phi3-jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3-jax"


def keep_compiled() -> None:
    """Cache compiled programs on disk, unless JAX_COMPILATION_CACHE_DIR already sets a location.

    The next run with the same shapes loads its step instead of compiling it. Several CPU
    devices are the exception: a program with several collectives that XLA's CPU runtime loaded from
    disk can deadlock, each device in another collective. Call this once the processes have joined.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or user_cache() / "compiled")
    remove_damaged_entries(folder)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def remove_damaged_entries(folder: Path) -> None:
    """Remove entries of JAX's compilation cache that cannot be decompressed.

    JAX would compile such a program again at every start, with a warning, and never replace the
    entry. Entries that have not changed since the last call are left alone.
    """
    if not folder.is_dir():
        return
    stamp = folder / "checked"
    last = stamp.stat().st_mtime_ns if stamp.exists() else 0
    with contextlib.suppress(OSError):  # a cache that this user may only read
        stamp.touch()
    for file in folder.glob("*-cache"):
        # Another process may remove it meanwhile, and JAX writes nothing but regular files.
        with contextlib.suppress(OSError):
            if not file.is_file() or file.stat().st_mtime_ns < last:
                continue
            if not _is_whole(file.read_bytes()):
                file.unlink()


def _is_whole(entry: bytes) -> bool:
    """Whether an entry can be decompressed, as far as this Python can tell."""
    decompress: Callable[[bytes], object] = zlib.decompress
    if entry.startswith(_ZSTANDARD):
        try:  # as JAX does
            if sys.version_info >= (3, 14):
                decompress = importlib.import_module("compression.zstd").decompress
            else:
                decompress = importlib.import_module("zstandard").ZstdDecompressor().decompress
        except ImportError:
            return True
    try:
        decompress(entry)
    except Exception:  # each library has an error of its own
        return False
    return True


def wait_for_chip(timeout: float, report: Callable[[str], None]) -> None:
    """Wait until no other process holds this host's TPU; call before JAX touches a device.

    JAX would fall back to the CPU, or fail with an error that does not name the process.

    Args:
        timeout: seconds to wait.
        report: prints a line, at once and then once a minute.

    Raises:
        UserError: the TPU is still held.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return
    if os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD", "").lower() in ("1", "true"):
        return
    started = time.monotonic()
    noticed = -math.inf
    while (holder := _lock_holder(LIBTPU_LOCK)) is not None:
        passed = time.monotonic() - started
        text = f"process {holder} holds this host's TPU (by {LIBTPU_LOCK}): end it"
        if passed >= timeout:
            raise UserError(f"{text}; waited {passed:.0f} s")
        if passed - noticed >= 60:
            noticed = passed
            report(f"{text}, or wait; {passed:.0f} of {timeout:.0f} s have passed")
        time.sleep(min(1.0, timeout))


def _lock_holder(file: Path) -> str | None:
    """Id and command line of another process that locks a file, as Linux lists it."""
    try:
        inode = file.stat().st_ino
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in locks:
        _, kind, _, _, pid, place, *_ = line.replace("->", "").split()
        if (
            kind not in ("FLOCK", "POSIX")
            or int(place.rpartition(":")[2]) != inode
            or int(pid) == os.getpid()
        ):
            continue
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            return pid
        shown = "".join(c for c in command.decode(errors="replace")[:100] if c.isprintable())
        return f"{pid} ({shown.strip()})"
    return None


def free_memory() -> int | None:
    """Bytes that this process may still use on each of its devices; None if unknown.

    A CPU's are shared with all else that runs there, and a container may have fewer.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        stats = devices[0].memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else round(0.9 * (limit - stats.get("bytes_in_use", 0)))
    found = [size for size in (_available_memory(), _cgroup_memory()) if size is not None]
    return min(found) // (2 * len(devices)) if found else None


def host_memory() -> int:
    """Bytes of memory of this machine, or of this container."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("memory.max")
    return physical if limit is None else min(limit, physical)


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kib[0]) if kib else None


def _cgroup_memory() -> int | None:
    """What is left of a container's limit."""
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return None if limit is None or used is None else max(0, limit - used)


def _cgroup(name: str) -> int | None:
    """A number about this container; None if there is none."""
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def compute_dtype(name: str) -> jnp.dtype:
    """Resolve `auto`: float32 on CPU, where XLA is no faster in bfloat16."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def check_types(model: ModelConfig, platform: str) -> None:
    """Raise UserError for a dtype the device does not support: it would be slow or not compile."""
    named = {"model.dtype": str(compute_dtype(model.dtype))}
    if (quantization := model.bitsandbytes) and quantization.bnb_4bit_compute_dtype:
        named["model.quantization.bnb_4bit_compute_dtype"] = quantization.bnb_4bit_compute_dtype
    capability = _capability()
    for key, name in named.items():
        if platform == "tpu" and name == "float16":
            raise UserError(f"{key}: TPUs do not support float16; use bfloat16")
        if capability is not None and capability < 8 and name == "bfloat16":
            raise UserError(
                f"{key}: a GPU of compute capability {capability} does not support bfloat16; use "
                "float16"
            )


def _capability() -> float | None:
    """Compute capability of the GPU; None elsewhere."""
    found = getattr(jax.local_devices()[0], "compute_capability", None)
    return None if found is None else float(found)


def attn_implementation(
    model: ModelConfig,
    data: DataConfig,
    rows: int,
    network: Phi3Config,
    platform: str,
    sequence: int = 1,
) -> Implementation:
    """The attention implementation for a run on `cpu`, `gpu` or `tpu`.

    Args:
        model, data: sections of the run's config.
        rows: rows per device and micro-batch.
        network: the base model's config.
        platform: what the run is on.
        sequence: devices that each row is cut over along its tokens.

    Raises:
        UserError: the configured implementation does not run on this platform, or rows of these
            lengths cannot be cut.
    """
    if sequence > 1 and (problems := _length_problems(PIECES * sequence, data)):
        raise UserError(
            f"mesh.sequence: {sequence} devices take {PIECES} pieces of each row each, but "
            f"{' and '.join(problems)}"
        )
    wanted = model.attn_implementation
    kernel: Implementation = "splash"
    if wanted == "cudnn" or (wanted == "auto" and platform == "gpu"):
        kernel = "cudnn_packed" if data.packing else "cudnn"
    multiple = MULTIPLES.get(kernel, 1) * (PIECES * sequence if sequence > 1 else 1)
    problems = [*_platform_problems(kernel, platform), *_length_problems(multiple, data)]
    if kernel != "splash":
        problems += _cudnn_problems(model.dtype, network)
        if sequence > 1:
            problems.append(f"it needs whole rows, and mesh.sequence is {sequence}")
    if wanted in ("splash", "cudnn") and problems:
        raise UserError(f"model.attn_implementation: {wanted} cannot run: {'; '.join(problems)}")
    if wanted == "auto" and kernel == "cudnn_packed":
        if 2 * rows * data.max_length**2 > CUDNN_MASK_BYTES:
            return "xla"
    return "xla" if wanted == "xla" or problems else kernel


def _platform_problems(kernel: Implementation, platform: str) -> list[str]:
    home = "tpu" if kernel == "splash" else "gpu"
    if platform == home:
        return []
    return [f"it is a {home.upper()} kernel, and this is a {platform.upper()}"]


def _length_problems(multiple: int, data: DataConfig) -> list[str]:
    """Check that both lengths that rows are padded to are multiples of that."""
    return [
        f"data.{key} {length} is not a multiple of {multiple}"
        for key in ("max_length", "pad_to_multiple_of")
        if (length := getattr(data, key)) % multiple
    ]


def _cudnn_problems(dtype: str, network: Phi3Config) -> list[str]:
    problems = []
    if dtype == "float32":
        problems.append("it needs a 16-bit dtype, and model.dtype is float32")
    if network.head_dim > 128 or network.head_dim % 8:
        problems.append(f"head_dim {network.head_dim} is not a multiple of 8 up to 128")
    capability = _capability()
    if capability is not None and capability < 8:
        problems.append(f"it needs compute capability 8.0, and this GPU has {capability}")
    return problems


def _kernel_platform() -> Literal["tpu", "gpu"] | None:
    """The platform, if the matmul kernels run on it."""
    platform = jax.default_backend()
    return "tpu" if platform == "tpu" else "gpu" if platform == "gpu" else None


def set_quantized_matmul(
    model: Phi3, wanted: str, devices: int, rows: int, dtype: jnp.dtype, backward: bool = False
) -> lora_flax.MatmulChoice | None:
    """Set the matmul of quantized layers according to `model.quantized_matmul`.

    Args:
        model: any model; one that is not quantized is unchanged unless `wanted` is `pallas`.
        wanted: `auto`, `xla` or `pallas`.
        devices: number of devices the model is on.
        rows: number of input rows that `auto` benchmarks with.
        dtype: dtype of the inputs.
        backward: include the gradient in the benchmark.

    Returns:
        The result of the benchmark, if `auto` ran one.

    Raises:
        UserError: `pallas` was requested but cannot run here.
        lora_flax.LoraError: `pallas` was requested but suits none of the weights.
    """
    platform = _kernel_platform() if devices == 1 else None
    if wanted == "pallas":
        if platform is None:
            raise UserError(
                "model.quantized_matmul: pallas needs a single TPU or GPU, and this is "
                f"{devices} x {jax.default_backend().upper()}"
            )
        lora_flax.use_fused_matmul(model, platform)
    if wanted != "auto" or platform is None:
        return None
    return lora_flax.choose_matmul(model, platform, rows, dtype, backward)
