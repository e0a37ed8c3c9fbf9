"""Temporary memory of attention and 4-bit matmuls, compiled for a GPU without having one.

    pip install '.[cuda]'
    JAX_PLATFORMS=cpu python benchmarks/gpu_compile.py h100_sxm.txtpb

The file is XLA's description of a GPU (openxla/xla, xla/backends/gpu/target_config/specs), with the
cuDNN version to compile for in `dnn_version_info`. Nothing runs: Phi-3-mini's attention (2 rows of
4,096 tokens) and one of its matmuls in NF4 are compiled with their gradients, as kernels and as
plain XLA.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from lora_flax import QuantizedArray
from phi3_jax.model.attention import attention
from phi3_jax.model.blockwise import Tokens

LENGTH = 4096
WEIGHT = (3072, 16384)  # gate_up_proj


def main() -> None:
    """Compile each program and print a row for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target_config", type=Path)
    args = parser.parse_args()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=args.target_config.read_text(), topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    print("| operation | temporary, MiB |\n| --- | ---: |")
    heads, ids = array((2, LENGTH, 32, 96), jnp.bfloat16), array((2, LENGTH), jnp.int32)
    for how in ("cudnn", "cudnn_packed", "xla"):
        for window in (None, 2047):

            def loss(q, k, v, positions, segments, how=how, window=window):
                tokens = Tokens(positions, segments, positions, segments)
                out = attention(q, k, v, tokens, window, True, how)
                return out.astype(jnp.float32).sum()

            size = _temporary(jax.grad(loss, argnums=(0, 1, 2)), heads, heads, heads, ids, ids)
            print(f"| attention: {how}, window {window} | {size:.0f} |", flush=True)
    plain = jax.ShapeDtypeStruct(WEIGHT, jnp.float32)
    kernel = jax.eval_shape(lambda w: QuantizedArray.quantize(w, "nf4", double=True), plain)
    kernel = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), kernel)
    for rows in (1, LENGTH):
        x = array((rows, WEIGHT[0]), jnp.bfloat16)
        for name, where in (("pallas", "gpu"), ("xla", None)):

            def both(x, kernel, where=where):
                out, pull = jax.vjp(lambda x: kernel.matmul(x, where), x)
                return pull(out)

            size = _temporary(both, x, kernel)
            print(f"| NF4 matmul, {rows} rows: {name} | {size:.0f} |", flush=True)


def _temporary(run: Any, *args: Any) -> float:
    """Temporary memory of the compiled function, MiB."""
    compiled = jax.jit(run).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


if __name__ == "__main__":
    main()
