"""Compile a run for hardware you do not have: memory, FLOPs, time, and whether it fits."""

from __future__ import annotations

import argparse
import functools

import jax
from rich.console import Console

from phi3_jax.cli.arguments import add_config, local_path
from phi3_jax.config.loader import load_config
from phi3_jax.errors import UserError
from phi3_jax.planning.plan import plan
from phi3_jax.planning.report import print_attempt, print_plan, print_profile, read_base
from phi3_jax.planning.search import largest
from phi3_jax.planning.topology import make_cpu_devices
from phi3_jax.platform import keep_compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_config(parser)
    parser.add_argument("--topology", required=True, help="for example v5e:2x4, v6e:2x2, cpu:8")
    parser.add_argument(
        "--model-config",
        type=local_path,
        metavar="FILE",
        help="config.json to use; by default that of model.path",
    )
    parser.add_argument(
        "--search", action="store_true", help="find the cheapest remat policy and largest batch"
    )
    parser.add_argument(
        "--quick", action="store_true", help="compile faster, with a higher peak memory"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="estimate the cycles of each part of a step, from the compiled program",
    )
    parser.add_argument(
        "--price", type=float, help="dollars per chip-hour, to report tokens per dollar"
    )


def run(args: argparse.Namespace) -> int:
    """Compile and print the plan."""
    make_cpu_devices(args.topology)
    if args.topology.startswith("cpu"):
        keep_compiled()
    else:  # without a TPU, JAX cannot load such a program again, and warns of each
        jax.config.update("jax_enable_compilation_cache", False)
    config, model_config = read_base(args.model_config, load_config(args.config, args.overrides))
    console = Console()
    if args.search:
        say = functools.partial(print_attempt, console=console)
        found = largest(config, model_config, args.topology, say, args.quick, args.profile)
        if found is None:
            raise UserError(
                f"{args.topology}: not even one row of {config.data.max_length} tokens fits"
            )
    else:
        found = plan(config, model_config, args.topology, quick=args.quick, profiled=args.profile)
    print_plan(found, console, args.price)
    print_profile(found, console)
    return 0
