"""Human conversations from the Chit-Chat Challenge, as chat examples.

One side is the user, the other the assistant. Consecutive messages from one side form one turn; the
first turn is the user's and the last the assistant's. Conversations are split at turns that are
very long or contain links, handles, long numbers, profanity or non-ASCII characters, and each part
is a separate example. Held-out examples come from conversations that training never sees.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

SEED = 0
HELD_OUT_SHARE = 0.06
# Longer stretches become several examples: about 250 tokens each, 98% at most 512.
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
    """Write train.jsonl and test.jsonl, one `{"messages": [...]}` per line.

    Args:
        package: folder of the `chitchat_dataset` package.
        directory: output folder; must exist.
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
    """The examples in one conversation, given as runs of messages, each with its sender."""
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
