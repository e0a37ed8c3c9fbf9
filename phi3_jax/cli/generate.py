"""Answer prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

import phi3_jax
from phi3_jax.cli.arguments import add_model, add_sampling, sampling
from phi3_jax.cli.session import encode, open_session
from phi3_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="user messages")
    parser.add_argument("--file", type=Path, help="a text file with one prompt per line")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without the chat template"
    )
    add_model(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Print one answer per prompt."""
    prompts = list(args.prompts)
    if args.file is not None:
        try:
            prompts += args.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file: {error}") from None
    if not prompts:
        raise UserError("no prompts; give them as arguments, or --file with one per line")
    session = open_session(args, len(prompts))
    ids = [encode(session, [{"role": "user", "content": p}], args.raw) for p in prompts]
    answers = phi3_jax.generate(session.model, ids, eos_ids=session.stops, **sampling(args))
    for answer in answers:
        print(str(session.tokenizer.decode(answer, skip_special_tokens=True)).strip())
    return 0
