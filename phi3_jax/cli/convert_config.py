"""Convert a config of a LoRA run of TRL, LLaMA-Factory or Axolotl to one of this program."""

from __future__ import annotations

import argparse
import sys

from phi3_jax.cli import exit_codes
from phi3_jax.cli.arguments import local_path
from phi3_jax.config.convert import convert
from phi3_jax.errors import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "file",
        type=local_path,
        help="a YAML file of TRL, LLaMA-Factory or Axolotl; see docs/training.md",
    )


def run(args: argparse.Namespace) -> int:
    """Write the config to standard output, and what it could not take over to standard error."""
    found = convert(args.file)
    print(f"# Converted from {found.program}'s {printable(args.file.name)}.\n{found.text}", end="")
    for note in found.notes:
        print(printable(note), file=sys.stderr)
    for problem in found.problems:
        print(printable(f"to correct: {problem}"), file=sys.stderr)
    return exit_codes.BAD_INPUT if found.problems else 0
