"""Size of each checkpoint: parameters, weights, and the adapter with its optimizer state.

    python benchmarks/checkpoint_sizes.py [--r 16]

Counted from the checkpoints' own config.json files, with the tensor table that loading uses.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from phi3_jax import Phi3Config
from phi3_jax.checkpoint.abstract import abstract_model
from phi3_jax.checkpoint.names import tensor_table

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "checkpoints"
LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# Float32: A and B, their gradients, and AdamW's two moments.
BYTES_OF_A_TRAINED_VALUE = 16


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--r", type=int, default=16)
    rank = parser.parse_args().r
    print(
        "| checkpoint | parameters | weights in bfloat16, GiB | trained (all-linear), r = ", end=""
    )
    print(f"{rank} | adapter, gradients, AdamW, GiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for file in sorted(FIXTURES.glob("*.json")):
        if file.stem.endswith("-su"):
            continue
        table = tensor_table(abstract_model(Phi3Config.from_file(file)))
        count = sum(math.prod(tensor.shape) for tensor in table)
        trained = sum(rank * sum(t.shape) for t in table if t.name.split(".")[-2] in LINEAR)
        print(
            f"| {file.stem} | {count:,} | {count * 2 / 2**30:.1f} | {trained:,} | "
            f"{trained * BYTES_OF_A_TRAINED_VALUE / 2**30:.2f} |"
        )


if __name__ == "__main__":
    main()
