"""Merge an adapter into its base model and save the result: `phi3-jax export --format merged`."""

from __future__ import annotations

import argparse

from phi3_jax.cli import export
from phi3_jax.errors import UserError
from phi3_jax.platform import keep_compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "--model", help="folder or hub id of the base model; by default the one the adapter names"
    )
    parser.add_argument("--adapter", help="folder or hub id of a PEFT adapter")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *export.PLAIN],
        help="dtype of the weights; auto is bfloat16",
    )
    export.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Merge and save."""
    if not (args.model or args.adapter):
        raise UserError("merge needs --adapter")
    keep_compiled()
    source = export.named_source(args.model, args.adapter)
    if source.adapter is None:
        raise UserError("merge needs --adapter")
    export.export(source, "merged", args.dtype, args.output, args.max_shard_size)
    return 0
