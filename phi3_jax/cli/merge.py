"""Merge an adapter into its base model and save the result."""

from __future__ import annotations

import argparse
from pathlib import Path

import phi3_jax
from phi3_jax.checkpoint.adapters import load_with_adapter
from phi3_jax.checkpoint.merged import merge_adapter, save_merged
from phi3_jax.cli.arguments import add_model
from phi3_jax.errors import UserError
from phi3_jax.platform import keep_compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_model(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--max-shard-size",
        type=float,
        default=5.0,
        metavar="GB",
        help="maximum size of one file (default 5)",
    )


def run(args: argparse.Namespace) -> int:
    """Merge and save."""
    if not args.adapter:
        raise UserError("merge needs --adapter")
    keep_compiled()
    checkpoint = phi3_jax.Checkpoint.open(args.model)
    dtype = "bfloat16" if args.dtype == "auto" else args.dtype
    model = load_with_adapter(checkpoint, phi3_jax.resolve(args.adapter), dtype)
    merge_adapter(model)
    save_merged(model, args.output, checkpoint.directory, int(args.max_shard_size * 10**9))
    print(f"merged model: {args.output}")
    return 0
