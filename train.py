"""The main job: `python train.py --config FILE [--resume] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import sys

from lora_flax import LoraError
from phi3_jax.config.loader import describe_keys, load_config
from phi3_jax.errors import UserError
from phi3_jax.planning.costs import keep_compiled
from phi3_jax.sharding import processes
from phi3_jax.training.loop import Interrupted, NonFiniteError, train
from phi3_jax.training.sweep import train_sweep

EXIT_BAD_INPUT = 2


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tune a Phi-3 model with LoRA and export a PEFT adapter.",
        epilog="The keys of a config file:\n\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in output_dir"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes of a run, as on a TPU pod; see docs/hosts.md",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="replaces one key of the file, e.g. training.learning_rate=1e-4",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit code: 2 for bad input, 1 for a run that had to stop."""
    args = parse_args(argv)
    # Orbax warns at every checkpoint that was not evaluated, which is no fault.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        keep_compiled()
        config = load_config(args.config, args.overrides)
        if args.distributed or processes.is_asked_for():
            processes.join()
        run = train_sweep if config.sweep.values else train
        run(config, resume=args.resume)
    except (UserError, LoraError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except NonFiniteError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # not between steps, where a signal saves a checkpoint first
        print("train.py: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Interrupted as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        return 128 + stop.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
