"""Arguments shared by several commands."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from phi3_jax.buckets import scheme_of
from phi3_jax.errors import machine_problem

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and overrides of its keys."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE|NAME",
        help="a YAML file, or the name of a shipped config (see `phi3-jax configs`)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="overrides a key of the file, e.g. training.learning_rate=1e-4",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--adapter` and `--dtype`."""
    parser.add_argument(
        "--model",
        required=True,
        help="folder or hub id of a Phi-3 checkpoint, or of an adapter that names its base",
    )
    parser.add_argument("--adapter", help="folder or hub id of a PEFT adapter")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of the weights; auto is float32 on CPU, else bfloat16",
    )


def add_rope_factors(parser: argparse.ArgumentParser) -> None:
    """Add `--rope-factors`."""
    parser.add_argument(
        "--rope-factors",
        default="by_text",
        choices=["by_text", "by_batch", "short", "long"],
        help="which of LongRoPE's factors apply, as in a config's model.rope_factors",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the settings of `phi3_jax.generate`."""
    parser.add_argument("--max-new-tokens", type=positive, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default)")
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def positive_gigabytes(text: str) -> int:
    """An argument in GB, as bytes."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return int(number * 10**9)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `phi3_jax.generate` and `stream`."""
    return {name: getattr(args, name) for name in (*_SAMPLING, "max_new_tokens")}


def local_path(text: str) -> Path:
    """The type of an argument that names a local file or folder."""
    if scheme := scheme_of(text):
        raise argparse.ArgumentTypeError(f"{text}: a local path is needed here, not {scheme}://")
    try:
        path = Path(text).expanduser()
        path.resolve()  # follows links
    except (RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {machine_problem(error) or error}") from None
    return path
