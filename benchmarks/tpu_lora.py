"""Cost of one dense layer with LoRA on a TPU, forward and backward, according to the TPU compiler.

    pip install '.[tpu]'
    python benchmarks/tpu_lora.py [--topology v5e:1x1] [--rank 16] [--dropout 0.05]

Nothing runs: Phi-3-mini's layers are compiled without a TPU, for 4,096 tokens, their weights in a
stack. `base` has no LoRA, `plain` is what XLA makes of the base's product and the update, `kernels`
is `model.lora_matmul: pallas`. The compiler gives no estimate for kernels: of these cycles, the
last column are the kernels' matrix products at the chip's full rate, a rank counted as the 128
columns that it takes in the matrix unit, or their bytes at full bandwidth, whichever takes longer.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lora_flax.fused_lora import plain_matmul
from lora_flax.kernels.product import How, Operands, lora_matmul
from phi3_jax.compiler import step_options
from phi3_jax.planning.costs import products
from phi3_jax.planning.hlo import Program
from phi3_jax.planning.profile import profile
from phi3_jax.planning.topology import CHIPS, devices_of

TOKENS, LAYERS = 4096, 4
SHAPES = {
    "qkv_proj": (3072, 9216),
    "o_proj": (3072, 3072),
    "gate_up_proj": (3072, 16384),
    "down_proj": (8192, 3072),
}


def main() -> None:
    """Compile each layer in each form and print a row of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    args = parser.parse_args()
    device = devices_of(args.topology)[0]
    sharding, options = SingleDeviceSharding(device), step_options("tpu", 1, device.device_kind)
    chip = CHIPS[args.topology.partition(":")[0]]

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    print(f"{args.topology}, r={args.rank}, dropout {args.dropout}; million cycles\n")
    print("| layer | ideal | base | plain | kernels | of these, in kernels |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (inputs, outputs) in SHAPES.items():
        operands = Operands(
            array((1, TOKENS, inputs), jnp.bfloat16),
            array((LAYERS, inputs, outputs), jnp.bfloat16),
            array((), jnp.int32),
            array((inputs, args.rank), jnp.float32),
            array((args.rank, outputs), jnp.float32),
            array((args.rank,), jnp.float32),
            array((1, TOKENS, 2), jnp.uint32) if args.dropout else None,
        )
        dy = array((1, TOKENS, outputs), jnp.bfloat16)
        ways: dict[str, Callable[[Operands], jax.Array]] = {
            "base": lambda o: o.x @ o.weights[o.layer],
            "plain": functools.partial(plain_matmul, rate=args.dropout),
            "kernels": functools.partial(lora_matmul, how=How("tpu", None, args.dropout)),
        }
        cells, kernels = [], 0.0
        for run in ways.values():
            step = functools.partial(_step, run)
            text = jax.jit(step, compiler_options=options).lower(operands, dy).compile().as_text()
            work = products(jax.make_jaxpr(step)(operands, dy))
            found = profile(Program.parse(text), work, chip, 0.0, 1)
            kernels = found.kernels
            cells.append(f"{sum(found.cycles.values()) / 1e6:.2f}")
        ideal = 4 * TOKENS * inputs * outputs / chip.flops * chip.clock / 1e6
        print(f"| {name} | {ideal:.2f} | {' | '.join(cells)} | {kernels / 1e6:.2f} |", flush=True)


def _step(run: Callable[[Operands], jax.Array], operands: Operands, dy: jax.Array) -> Any:
    """The output, and the gradients of x, A, and B."""

    def of(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return run(operands._replace(x=x, a=a, b=b))

    y, pull = jax.vjp(of, operands.x, operands.a, operands.b)
    return y, pull(dy)


if __name__ == "__main__":
    main()
