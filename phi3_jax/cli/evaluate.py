"""Compare held-out loss and answer quality with and without the adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from phi3_jax.buckets import scheme_of
from phi3_jax.cli.arguments import add_config, local_path, positive
from phi3_jax.config.loader import load_config
from phi3_jax.errors import UserError
from phi3_jax.evaluation.metrics import evaluate, print_evaluation, write_evaluation
from phi3_jax.platform import keep_compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_config(parser)
    parser.add_argument(
        "--adapter",
        help="folder or hub id of an adapter; by default the run's own, output_dir/adapter",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, help="per answer (default 64)"
    )
    parser.add_argument("--max-questions", type=positive, help="answer only the first N questions")
    parser.add_argument(
        "--output", type=local_path, help="folder to write to; by default output_dir"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the results and print them."""
    keep_compiled()
    config = load_config(args.config, args.overrides)
    output, adapter = Path(config.training.output_dir).expanduser(), args.adapter
    if config.sweep.values and adapter is None:
        raise UserError(
            f"{args.config}: a sweep has an adapter for each member: evaluate one with its own "
            f"config, {config.training.output_dir.rstrip('/')}/MEMBER/config.yaml, or name it with "
            "--adapter"
        )
    if scheme_of(config.training.output_dir):
        if args.output is None:
            raise UserError("training.output_dir is in a bucket: name a local folder, --output")
        adapter = adapter or f"{config.training.output_dir.rstrip('/')}/adapter"
    elif adapter is None and (output / "adapter").is_dir():
        adapter = str(output / "adapter")
    result = evaluate(config, adapter, args.max_new_tokens, args.max_questions)
    write_evaluation(result, args.output or output)
    print_evaluation(result, Console())
    print(f"samples: {(args.output or output) / 'evaluation_samples.jsonl'}")
    return 0
