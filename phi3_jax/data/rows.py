"""The three forms that a row takes once it is parsed: a chat, a prompt with completion, a text."""

from __future__ import annotations

import dataclasses

Message = dict[str, str]


class RowError(ValueError):
    """A row that does not match its format; the caller adds the location."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """Messages for the chat template. Only turns from `learn_from` on are learned."""

    messages: list[Message]
    learn_from: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """A plain-text prompt and completion; only the completion is learned."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text, all of it learned."""

    text: str


Row = Chat | Completion | Text
