"""The Chit-Chat Challenge's conversations between people, as chat examples.

One side is the user, the other the assistant: consecutive messages of one side are one turn, the
first turn is the user's and the last the assistant's. A conversation is broken at turns that are
very long or hold links, handles, long numbers, profanity or non-ASCII characters, and its parts are
examples of their own. Held-out examples come from conversations that training never sees.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

SEED = 0
HELD_OUT_SHARE = 0.06
# Longer stretches are several examples: about 250 tokens each, 98 % at most 512.
MAX_TURNS = 12
# Longer turns are mostly pasted text.
MAX_CHARACTERS = 400
UNWANTED = re.compile(
    r"https?:|www\.|\.com\b|@\w|\d{5,}"
    r"|\b(?:fuck|shit|bitch|cunt|nigg|fag|whore|slut|dick|pussy|rape|porn|nude|sex|damn)\w*",
    re.IGNORECASE,
)
Chat = list[dict[str, str]]


def write_chats(package: Path, directory: Path) -> None:
    """Write train.jsonl and test.jsonl, one `{"messages": [...]}` a line.

    Args:
        package: the folder of the package `chitchat_dataset`.
        directory: where to write; exists.
    """
    conversations = json.loads((package / "dataset.json").read_text(encoding="utf-8"))
    names = sorted(conversations)
    random.Random(SEED).shuffle(names)
    held_out = int(len(names) * HELD_OUT_SHARE)
    for file, part in (("test.jsonl", names[:held_out]), ("train.jsonl", names[held_out:])):
        with (directory / file).open("w", encoding="utf-8") as out:
            for name in part:
                for chat in chats(conversations[name]["messages"]):
                    out.write(json.dumps({"messages": chat}) + "\n")


def chats(messages: list[list[dict[str, str]]]) -> Iterator[Chat]:
    """The examples of one conversation: runs of messages, each message with its sender."""
    roles = ("user", "assistant")
    part: list[str] = []
    for text in [*_turns(messages), ""]:  # the empty turn ends the last part
        wanted = 0 < len(text) <= MAX_CHARACTERS and text.isascii() and not UNWANTED.search(text)
        if wanted:
            part.append(text)
        if not wanted or len(part) == MAX_TURNS:
            chat = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(part)]
            if len(chat) >= 2:
                yield chat[: len(chat) // 2 * 2]
            part = []


def _turns(messages: list[list[dict[str, str]]]) -> list[str]:
    turns: list[str] = []
    last_sender = None
    for run in messages:
        for message in run:
            text = " ".join(message["text"].split())
            if not text:
                continue
            if message["sender"] == last_sender:
                turns[-1] += f" {text}"
            else:
                turns.append(text)
            last_sender = message["sender"]
    return turns
