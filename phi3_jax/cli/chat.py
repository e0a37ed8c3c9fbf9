"""Chat with a model in the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from rich.console import Console

import lora_flax
import phi3_jax
from phi3_jax.cli.arguments import add_model, add_sampling, sampling
from phi3_jax.cli.session import Session, encode, open_session
from phi3_jax.errors import UserError

HELP = "/reset starts a new chat, /base and /adapter turn the adapter off and on, /quit exits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.epilog = HELP
    parser.add_argument("--system", help="a system message")
    add_model(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Answer until `/quit` or the end of the input."""
    session, console = open_session(args, 1), Console(highlight=False)
    if not session.tokenizer.chat_template:
        raise UserError(f"{args.model} has no chat template; use `phi3-jax generate --raw`")
    start = [{"role": "system", "content": args.system}] if args.system else []
    history = list(start)
    console.print(HELP, style="dim")
    while True:
        try:
            text = console.input("[bold]you:[/bold] ").strip()
        except EOFError:
            return 0
        if text == "/quit":
            return 0
        if text in ("/reset", "/base", "/adapter"):
            _command(session, text, console)
            history = list(start) if text == "/reset" else history
            continue
        if not text:
            continue
        history.append({"role": "user", "content": text})
        console.print("[bold]model:[/bold] ", end="")
        answer = ""
        for piece in _pieces(session, encode(session, history, raw=False), args):
            console.print(piece, end="", markup=False, soft_wrap=True)
            answer += piece
        console.print()
        history.append({"role": "assistant", "content": answer.strip()})


def _command(session: Session, text: str, console: Console) -> None:
    names = lora_flax.adapter_names(session.model)
    if text == "/reset":
        console.print("started a new chat", style="dim")
    elif not names:
        console.print("no adapter is loaded", style="dim")
    else:
        lora_flax.set_adapter(session.model, [] if text == "/base" else names)
        console.print("adapter off" if text == "/base" else "adapter on", style="dim")


def _pieces(session: Session, ids: list[int], args: argparse.Namespace) -> Iterator[str]:
    """The answer as it is generated. A token may be part of a character, so all are decoded."""
    tokens: list[int] = []
    shown = ""
    for token in phi3_jax.stream(session.model, ids, eos_ids=session.stops, **sampling(args)):
        tokens.append(token)
        text = str(session.tokenizer.decode(tokens, skip_special_tokens=True))
        if text.endswith("\ufffd"):
            continue
        yield text[len(shown) :]
        shown = text
