"""Where the cycles of a training step go on TPUs, according to the TPU compiler.

    pip install '.[tpu]'
    python benchmarks/tpu_step.py [--topologies v5e:1x1 v5p:2x2x1] [--remat auto full attention+qkv]
        [--config phi3_mini_4k_lora] [--summary] [section.key=value ...]

Nothing runs: each step is compiled without a TPU. One row of 4,096 tokens per chip, weights sharded
over all chips, no accumulation. Prints what `phi3-jax plan --profile` prints, then a line for each
step; with --summary only these lines.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from phi3_jax import Phi3Config
from phi3_jax.config.loader import load_config
from phi3_jax.model.remat import SAVED, Remat
from phi3_jax.planning.plan import plan
from phi3_jax.planning.report import print_profile
from phi3_jax.training.remat import to_text

CHECKPOINTS = Path(__file__).parents[1] / "tests" / "fixtures" / "checkpoints"
SHAPE = (
    "data.max_length=4096",
    "training.per_device_train_batch_size=1",
    "training.gradient_accumulation_steps=1",
    "training.gradient_checkpointing=auto",
    "mesh.fsdp=-1",
)


def main() -> None:
    """Compile each step and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="phi3_mini_4k_lora")
    parser.add_argument("--topologies", nargs="+", default=["v5e:1x1", "v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--remat", nargs="+", default=["auto"])
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config(args.config, [*SHAPE, *args.overrides])
    name = config.model.path.split("/")[-1]
    shape = Phi3Config.from_file(CHECKPOINTS / f"{name}.json")
    console = Console(width=120)
    kept = config.model.bitsandbytes
    base = config.model.dtype if kept is None else kept.kind
    rate = config.peft.lora_dropout
    console.print(f"{name}, base {base}, LoRA r={config.peft.r}, dropout {rate}")
    names = "peak, GiB | cycles, million | ideal | collectives | of which hidden | step, s | MFU"
    lines = [f"| topology | remat | {names} |", "| --- | --- |" + " ---: |" * 7]
    for topology in args.topologies:
        for text in args.remat:
            found = plan(config, shape, topology, _policy(text), profiled=True)
            remat = to_text(found.remat)
            costs = found.profile
            if costs is None:
                lines.append(f"| {topology} | {remat} | does not fit |" + " |" * 6)
                continue
            if not args.summary:
                console.print(f"{topology}, remat {remat}")
                print_profile(found, console)
            cycles, ideal = (sum(c.values()) / 1e6 for c in (costs.cycles, costs.ideal))
            seconds, beside = costs.seconds_with_collectives, costs.overlap
            lines.append(
                f"| {topology} | {remat} | {found.peak / 2**30:.2f} | {cycles:,.0f} | "
                f"{ideal:,.0f} | {beside.total / 1e6:,.0f} | {beside.hidden:.0%} | "
                f"{seconds:.3f} | {costs.utilization(seconds):.1%} |"
            )
    print("\n".join(lines))


def _policy(text: str) -> Remat | None:
    """A policy, or named values joined by `+`; None for `auto`."""
    if text == "auto":
        return None
    policies: tuple[Remat, ...] = ("none", "dots", "full", "offload")
    if text in policies:
        return text
    names = text.split("+")
    if unknown := set(names) - set(SAVED):
        raise SystemExit(f"--remat: {', '.join(sorted(unknown))} is none of {', '.join(SAVED)}")
    return tuple(name for name in SAVED if name in names)


if __name__ == "__main__":
    main()
