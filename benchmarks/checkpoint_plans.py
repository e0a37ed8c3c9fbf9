"""Memory per TPU chip of a training step, for every checkpoint, according to the TPU compiler.

    pip install '.[tpu]'
    python benchmarks/checkpoint_plans.py [--length 4096] [--topologies v5e:1x1 v5e:2x2 v5e:2x4]

For each shipped phi*_lora.yaml and phi*_qlora.yaml: the first topology that fits a step of one row
per chip, without accumulation, with the config's own adapter, and each layer recomputed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from phi3_jax import Phi3Config
from phi3_jax.config.loader import load_config
from phi3_jax.planning.plan import Plan, plan

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "phi3_jax" / "configs"
FIXTURES = ROOT / "tests" / "fixtures" / "checkpoints"


def first_that_fits(file: Path, args: argparse.Namespace) -> tuple[str, Plan | None]:
    """The checkpoint's name and the plan on the first topology that fits, None if none does."""
    config = load_config(
        file,
        [
            f"data.max_length={args.length}",
            "training.per_device_train_batch_size=1",
            "training.gradient_accumulation_steps=1",
            "training.gradient_checkpointing=true",
        ],
    )
    name = config.model.path.split("/")[-1]
    shape = Phi3Config.from_file(FIXTURES / f"{name}.json")
    for topology in args.topologies:
        found = plan(config, shape, topology)
        if found.fits:
            return name, found
    return name, None


def main() -> None:
    """Print each row as soon as its plan is compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--topologies", nargs="+", default=["v5e:1x1", "v5e:2x2", "v5e:2x4"])
    parser.add_argument("--configs", nargs="+", default=["phi*lora.yaml"])
    args = parser.parse_args()
    print(f"GiB per chip; rows of {args.length} tokens\n")
    print("| checkpoint | weights | fits | weights | adapter, AdamW | activations | peak |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for file in sorted(f for pattern in args.configs for f in CONFIGS.glob(pattern)):
        name, found = first_that_fits(file, args)
        kind = "NF4" if file.stem.endswith("_qlora") else "bfloat16"
        if found is None:
            print(f"| {name} | {kind} | none | | | | |", flush=True)
            continue
        adapter = found.adapter + found.optimizer
        sizes = (found.weights, adapter, found.activations, found.peak)
        cells = " | ".join(f"{size / 2**30:.2f}" for size in sizes)
        print(f"| {name} | {kind} | {found.topology} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
