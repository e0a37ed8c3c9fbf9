"""List the configs that ship with the package."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap

from phi3_jax.config.shipped import describe_shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print one line per config, which a terminal gets wrapped beside the name."""
    described = describe_shipped()
    margin = max(map(len, described)) + 2
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, line in described.items():
        text = f"{name:<{margin}}{line}"
        if columns is not None:
            # At least 20 for the text, where a terminal is narrower than that.
            width = max(columns, margin + 20)
            text = textwrap.fill(text, width, subsequent_indent=" " * margin)
        print(text)
    return 0
