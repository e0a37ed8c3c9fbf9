"""Copy a shipped config to a file that you can edit, with the meaning of each key."""

from __future__ import annotations

import argparse
from pathlib import Path

import lora_flax
from phi3_jax.cli.arguments import local_path
from phi3_jax.config.annotate import annotate
from phi3_jax.config.shipped import shipped_path
from phi3_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "name", nargs="?", default="quickstart", help="see `phi3-jax configs` (default: quickstart)"
    )
    parser.add_argument("--output", type=local_path, metavar="FILE", help="by default NAME.yaml")


def run(args: argparse.Namespace) -> int:
    """Copy the file with its comments, and explain the keys that have none."""
    source = shipped_path(args.name)
    target = args.output or Path(source.name)
    if target.exists():
        raise UserError(f"{target} already exists; choose another --output")
    try:
        lora_flax.write_atomically(target, annotate(source.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--output: {error}") from None
    print(
        f"wrote {target}; edit it (every key: docs/config.md), look at the data with "
        f"`phi3-jax preview --config {target}`, and run `phi3-jax train --config {target}`"
    )
    return 0
