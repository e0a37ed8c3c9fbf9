"""Fine-tune a Phi-3 model with LoRA and export a PEFT adapter."""

from __future__ import annotations

import argparse
import logging
import sys

from phi3_jax.cli import exit_codes
from phi3_jax.cli.arguments import add_config
from phi3_jax.config.describe import describe_keys
from phi3_jax.config.loader import load_config
from phi3_jax.platform import keep_compiled
from phi3_jax.sharding import processes
from phi3_jax.training.interrupt import Interrupted
from phi3_jax.training.loop import NonFiniteError, train
from phi3_jax.training.sweep import train_sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "The keys of a config file:\n\n" + describe_keys()
    add_config(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in output_dir"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this process is one of several of the same run, as on a TPU pod; see docs/hosts.md",
    )


def run(args: argparse.Namespace) -> int:
    """Train and return the exit code."""
    # Orbax warns about every checkpoint without metrics, which is expected.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        config = load_config(args.config, args.overrides)
        if args.distributed or processes.is_asked_for():
            processes.join()
        keep_compiled()
        (train_sweep if config.sweep.values else train)(config, resume=args.resume)
    except NonFiniteError as error:
        print(f"phi3-jax train: {error}", file=sys.stderr)
        return exit_codes.NON_FINITE
    except KeyboardInterrupt:  # outside the loop: between steps a signal saves a checkpoint first
        print(
            "phi3-jax train: interrupted; use --resume to continue from the last checkpoint",
            file=sys.stderr,
        )
        return exit_codes.INTERRUPTED
    except Interrupted as stop:
        print(f"phi3-jax train: {stop}", file=sys.stderr)
        return exit_codes.SIGNAL + stop.signum
    return exit_codes.OK
