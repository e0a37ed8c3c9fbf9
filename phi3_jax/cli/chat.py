"""Chat with a model in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

import lora_flax
import phi3_jax
from phi3_jax.cli.arguments import add_model, add_rope_factors, add_sampling, sampling
from phi3_jax.cli.session import Session, open_session
from phi3_jax.errors import UserError, printable
from phi3_jax.generation.prompts import encode_chat, require_unicode

Chat = list[dict[str, str]]

HELP = (
    "/reset starts a new chat, /base and /adapter turn the adapter off and on, /quit exits; "
    "Ctrl-C stops an answer"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.epilog = HELP
    parser.add_argument("--system", help="a system message")
    add_model(parser)
    add_rope_factors(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Answer until `/quit` or the end of the input."""
    require_unicode(args.system or "", "--system")
    session, console = open_session(args, 1), Console(highlight=False)
    if not session.tokenizer.chat_template:
        raise UserError(f"{args.model} has no chat template; use `phi3-jax generate --raw`")
    start = [{"role": "system", "content": args.system}] if args.system else []
    _require_room(session, start)
    history, settings = list(start), sampling(args)
    console.print(HELP, style="dim")
    while (text := _read(console)) not in (None, "/quit"):
        if text in ("/reset", "/base", "/adapter"):
            _command(session, text, console)
            history = list(start) if text == "/reset" else history
        elif text:
            question = {"role": "user", "content": text}
            history = _turn(session, [*history, question], len(start), settings, console)
            settings["seed"] += 1  # each answer is drawn anew
    return 0


def _require_room(session: Session, start: Chat) -> None:
    """Check that the system message leaves room for a chat.

    Raises:
        UserError: it does not.
    """
    positions = session.model.config.max_position_embeddings
    count = len(encode_chat([*start, {"role": "user", "content": ""}], session.tokenizer))
    if count >= positions:
        raise UserError(
            f"--system: with it the prompt has {count} tokens, and the model {positions} positions"
        )


def _read(console: Console) -> str | None:
    """The next message, None at the end of the input.

    Raises:
        UserError: piped input that is not UTF-8. On a terminal it is one message that is ignored.
    """
    try:
        text = console.input("[bold]you:[/bold] ").removeprefix("\ufeff").strip()
        require_unicode(text, "the input")
        return text
    except EOFError:
        return None
    except (UnicodeDecodeError, UserError) as error:
        reason = error if isinstance(error, UserError) else f"the input is not valid UTF-8: {error}"
        if not sys.stdin.isatty():
            raise UserError(str(reason)) from None
        console.print(f"{reason}; ignored", style="dim", markup=False)
        return ""


def _turn(
    session: Session, chat: Chat, start: int, settings: dict[str, Any], console: Console
) -> Chat:
    """Answer the last message, and return the chat so far. Ctrl-C ends the answer, not the chat.

    Args:
        session: the model.
        chat: the messages so far, the last one from the user.
        start: number of messages to keep at the start, the system message.
        settings: those of `phi3_jax.stream`; `max_new_tokens` is reduced to the room there is.
        console: where the answer goes.
    """
    positions = session.model.config.max_position_embeddings
    shorter, ids = _fit(session, chat, start, settings["max_new_tokens"])
    if len(ids) >= positions:
        console.print(
            f"this message is too long: with it the prompt has {len(ids)} tokens, and the model "
            f"{positions} positions; it was left out",
            style="dim",
        )
        return chat[:-1]
    if dropped := len(chat) - len(shorter):
        console.print(
            f"the model's {positions} positions are full: dropped the {dropped} oldest messages "
            "(/reset starts a new chat)",
            style="dim",
        )
    room = min(settings["max_new_tokens"], positions - len(ids))
    console.print("[bold]model:[/bold] ", end="")
    answer = ""
    tokens: list[int] = []
    try:
        for piece in _pieces(session, ids, tokens, settings | {"max_new_tokens": room}):
            answer += piece
            console.print(printable(piece), end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt as error:
        if type(error) is not KeyboardInterrupt:  # SIGTERM or SIGHUP
            raise
        console.print("\nstopped", style="dim")
        return [*shorter, {"role": "assistant", "content": answer.strip()}] if answer else chat[:-1]
    console.print()
    if len(ids) + len(tokens) == positions and tokens[-1] not in session.stops:
        console.print(f"cut off at the model's {positions} positions", style="dim")
    return [*shorter, {"role": "assistant", "content": answer.strip()}]


def _fit(session: Session, chat: Chat, start: int, max_new_tokens: int) -> tuple[Chat, list[int]]:
    """The chat without as many of its oldest turns as it takes to fit, and its token ids.

    There is to be room for `max_new_tokens`, or for half of the model's positions if that is less.
    The messages before `start` and the last message always stay.
    """
    positions = session.model.config.max_position_embeddings
    longest = positions - min(max_new_tokens, positions // 2)
    ids = encode_chat(chat, session.tokenizer)
    while len(ids) > longest and len(chat) > start + 1:
        chat = chat[:start] + chat[start + 2 :]  # a question with its answer
        ids = encode_chat(chat, session.tokenizer)
    return chat, ids


def _command(session: Session, text: str, console: Console) -> None:
    names = lora_flax.adapter_names(session.model)
    if text == "/reset":
        console.print("started a new chat", style="dim")
    elif not names:
        console.print("no adapter is loaded", style="dim")
    else:
        lora_flax.set_adapter(session.model, [] if text == "/base" else names)
        console.print("adapter off" if text == "/base" else "adapter on", style="dim")


def _pieces(
    session: Session, ids: list[int], tokens: list[int], settings: dict[str, Any]
) -> Iterator[str]:
    """The answer as it is generated; its tokens are appended to `tokens`.

    A token may be part of a character, so all of them are decoded each time, and the text is held
    back while it ends within one.
    """
    shown = text = ""
    for token in phi3_jax.stream(session.model, ids, eos_ids=session.stops, **settings):
        tokens.append(token)
        text = str(session.tokenizer.decode(tokens, skip_special_tokens=True))
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]
