"""Cost of a matmul with a 4-bit weight on a TPU, according to the TPU compiler.

    pip install '.[tpu]'
    python benchmarks/tpu_matmul.py [--topology v5e:1x1] [--rows 1 4096]

Nothing runs: the matmul is compiled without a TPU. Cycles are the compiler's estimates, summed over
the program: for a matmul with a bfloat16 weight, and what dequantizing in XLA adds to it. The
compiler gives no estimate for the Pallas kernel, but both have temporary memory, which shows what
is written to HBM in between.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lora_flax import QuantizedArray
from phi3_jax.planning.topology import devices_of

SHAPES = {
    "Phi-3-mini gate_up_proj": (3072, 16384),
    "Phi-3-mini down_proj": (8192, 3072),
    "phi-4 gate_up_proj": (5120, 35840),
    "phi-4 down_proj": (17920, 5120),
}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def main() -> None:
    """Compile each shape and number of rows, and print a row of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4096])
    args = parser.parse_args()
    sharding = SingleDeviceSharding(devices_of(args.topology)[0])

    def placed(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    print(f"{args.topology}; cycles in thousands, temporary memory in MiB\n")
    print("| weight | rows | bfloat16 matmul | added by dequantizing | XLA, MiB | pallas, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, shape in SHAPES.items():
        kernel = placed(jax.ShapeDtypeStruct(shape, jnp.bfloat16))
        quantized = jax.eval_shape(lambda k: QuantizedArray.quantize(k, "nf4", double=True), kernel)
        quantized = jax.tree.map(placed, quantized)
        for rows in args.rows:
            x = placed(jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16))
            plain = jax.jit(jnp.matmul).lower(x, kernel).compile()
            ways = {
                where: jax.jit(lambda x, q, where=where: q.matmul(x, where))
                .lower(x, quantized)
                .compile()
                for where in (None, "tpu")
            }
            memory = [w.memory_analysis().temp_size_in_bytes / 2**20 for w in ways.values()]
            more = _cycles(ways[None]) - _cycles(plain)
            print(
                f"| {name} | {rows} | {_cycles(plain) / 1e3:.0f} | {more / 1e3:.0f} | "
                f"{memory[0]:.0f} | {memory[1]:.0f} |",
                flush=True,
            )


def _cycles(program: Any) -> int:
    """Estimated cycles of the entry computation; a fusion's estimate covers its operations."""
    text = program.as_text()
    return sum(int(found) for found in _CYCLES.findall(text[text.index("ENTRY") :]))


if __name__ == "__main__":
    main()
