"""List the configs that ship with the package."""

from __future__ import annotations

import argparse

from phi3_jax.config.shipped import describe_shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print one line per config."""
    described = describe_shipped()
    width = max(map(len, described))
    for name, line in described.items():
        print(f"{name:<{width}}  {line}")
    return 0
