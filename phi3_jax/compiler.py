"""Options with which XLA compiles the steps of training and evaluation."""

from __future__ import annotations

import functools
import os
from platform import machine

import jax
import jax.numpy as jnp

# KiB of a TPU's fast memory that one operation may take, by kind of device; both have 64 MiB or
# more. With the 16 MiB that are the default there, products of 4,096 tokens read their operands
# more often: by the compiler's cycles, Phi-3-mini's step takes 14 % longer on a v5e.
_FAST_MEMORY = {"TPU v5 lite": 48 * 1024, "TPU v5": 48 * 1024}
_FAST_MEMORY_OPTION = "xla_tpu_scoped_vmem_limit_kib"
# MiB from which a product with a weight that is cut over devices passes the parts around and adds
# up partial products, one for each part, each read and written whole. Gathering the weight first,
# beside other work, takes half of the cycles and less.
_RING_OPTION = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
_NEVER = 2**20


@functools.cache
def step_options(platform: str, devices: int, kind: str) -> dict[str, str]:
    """The options for devices of a platform; `LIBTPU_INIT_ARGS` comes first.

    On an x86 CPU, XLA 0.10 computes large matmuls with YNNPACK, which on Intel's Sapphire Rapids
    reaches 0.8 of the rate of XLA's own (oneDNN's kernels). Only reductions stay with YNNPACK.
    LLVM uses vectors of 256 bits unless it is told that 512 are welcome, where there are any.
    Programs over several CPU devices are left as they are: their collectives have deadlocked.

    Args:
        platform, kind: `platform` and `device_kind` of the devices.
        devices: number of devices that a program runs on.
    """
    wanted: dict[str, str] = {}
    if platform == "tpu":
        if devices > 1:
            wanted[_RING_OPTION] = str(_NEVER)
        if kind in _FAST_MEMORY:
            wanted[_FAST_MEMORY_OPTION] = str(_FAST_MEMORY[kind])
        set_by_user = os.environ.get("LIBTPU_INIT_ARGS", "")
        wanted = {name: value for name, value in wanted.items() if name not in set_by_user}
    elif platform == "cpu" and devices == 1 and machine() in ("x86_64", "AMD64"):
        wanted = {
            "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
            "xla_cpu_prefer_vector_width": "512",
        }
    if platform != jax.default_backend():  # `plan`, for devices that are elsewhere
        return wanted
    return {name: value for name, value in wanted.items() if _is_option(name, value)}


def _is_option(name: str, value: str) -> bool:
    """Whether this version of XLA has such an option."""
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
