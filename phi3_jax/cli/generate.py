"""Answer prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

import phi3_jax
from phi3_jax.cli.arguments import (
    add_model,
    add_rope_factors,
    add_sampling,
    local_path,
    sampling,
)
from phi3_jax.cli.session import open_session, say
from phi3_jax.errors import UserError, printable
from phi3_jax.generation.answers import decode
from phi3_jax.generation.prompts import encode_chat, encode_text, rooms

# Files that the shell opened.
_OPEN_FILES = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="user messages")
    parser.add_argument(
        "--file",
        type=local_path,
        help="a text file with one prompt per line; blank lines are skipped",
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without the chat template"
    )
    add_model(parser)
    add_rope_factors(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Print one answer per prompt; prompts without room for an answer are named on stderr."""
    prompts = list(args.prompts) + ([] if args.file is None else _read_prompts(args.file))
    if not prompts:
        raise UserError("no prompts; give them as arguments, or --file with one per line")
    session = open_session(args, len(prompts))
    model, tokenizer = session.model, session.tokenizer
    if args.raw:
        ids = [encode_text(prompt, tokenizer) for prompt in prompts]
    else:
        ids = [encode_chat([{"role": "user", "content": p}], tokenizer) for p in prompts]
    settings = sampling(args)
    wanted = settings.pop("max_new_tokens")
    limits = rooms(ids, wanted, model.config)
    fits = [i for i, limit in enumerate(limits) if limit]
    positions = model.config.max_position_embeddings
    if not fits:
        raise UserError(
            f"no prompt leaves room for an answer: the model has {positions} positions, and the "
            f"shortest prompt has {min(map(len, ids))} tokens"
        )
    answers = phi3_jax.generate(
        model,
        [ids[i] for i in fits],
        [limits[i] for i in fits],
        eos_ids=session.stops,
        **settings,
    )
    for answer in answers:
        print(printable(decode(answer, tokenizer)))
    for i in sorted({*range(len(ids))} - {*fits}):
        say(f"prompt {i + 1} was not answered: it has {len(ids[i])} tokens, the model {positions}")
    cut = [
        i + 1
        for i, answer in zip(fits, answers, strict=True)
        if len(answer) == limits[i] < wanted and answer[-1] not in session.stops
    ]
    if cut:
        say(f"cut off at the model's {positions} positions: the answers to prompts {cut}")
    return 0


def _read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    # A named pipe may never end; one of the shell, `--file <(...)`, does.
    if file.exists() and not file.is_file() and not str(file).startswith(_OPEN_FILES):
        raise UserError(f"--file {file}: not a regular file")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--file {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--file {file}: {error}") from None
    return [line for line in lines if line.strip()]
