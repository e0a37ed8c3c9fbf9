"""Upload an adapter or a model folder to the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys

from phi3_jax.checkpoint.push import push_folder
from phi3_jax.cli.arguments import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("folder", type=local_path, help="an adapter, or a merged model")
    parser.add_argument("repo", help="repository on the hub, for example USER/NAME")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private"
    )
    visibility.add_argument(
        "--public", dest="private", action="store_false", help="make a new repository public"
    )
    parser.add_argument("--message", help="message of the commit")


def run(args: argparse.Namespace) -> int:
    """Push the folder and print where it is."""
    watched = sys.stderr.isatty()
    print(push_folder(args.folder, args.repo, args.private, args.message, progress=watched))
    return 0
