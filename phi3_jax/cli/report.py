"""Write the report of a run, or compare several, as one HTML file that needs nothing else."""

from __future__ import annotations

import argparse

from phi3_jax.cli.arguments import local_path
from phi3_jax.errors import UserError
from phi3_jax.report.write import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "folders",
        nargs="+",
        type=local_path,
        metavar="DIR",
        help="output_dir of a run or sweep; a sweep stands for its members",
    )
    parser.add_argument(
        "--output",
        type=local_path,
        metavar="FILE",
        help="by default report.html in DIR, or in the current folder if there are several",
    )
    parser.add_argument(
        "--price",
        type=float,
        metavar="DOLLARS",
        help="what an hour of all devices costs, in place of training.price_per_hour",
    )


def run(args: argparse.Namespace) -> int:
    """Read the folders and write the page."""
    if args.price is not None and not 0 <= args.price < float("inf"):
        raise UserError(f"--price {args.price}: a number of dollars, 0 or more, is needed")
    print(f"report: {write_report(args.folders, args.output, args.price)}")
    return 0
