"""The forms that a row takes once it is parsed: chat, prompt with completion, segments, text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from phi3_jax.errors import UserError

Message = dict[str, Any]
Kind = Literal[
    "unreadable",
    "unknown columns",
    "malformed",
    "lost by the template",
    "refused by the template",
    "nothing to learn",
    "impossible to mask",
]


class RowError(UserError):
    """A row that cannot become an example; the caller adds the location.

    Attributes:
        kind: what the report counts it as.
    """

    def __init__(self, message: str, kind: Kind = "malformed") -> None:
        super().__init__(message)
        self.kind: Kind = kind


@dataclasses.dataclass(frozen=True)
class Source:
    """One raw row and its location; `problem` is set if it could not be read."""

    where: str
    row: Any
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Chat:
    """Messages for the chat template. Only turns from `learn_from` on are learned.

    Attributes:
        messages: the messages with every key of the row; roles are the template's names.
        learn_from: index of the first message that can be learned.
        tools: the functions that the model may call, as JSON schemas.
        tools_text: the same as JSON text, as the row has it if it has text.
        flags: whether the row asks to learn a message, for those where it says so.
        labels: where each message is in the row, for errors; `messages[i]` where missing.
    """

    messages: list[Message]
    learn_from: int = 0
    tools: list[dict[str, Any]] | None = None
    tools_text: str | None = None
    flags: Mapping[int, bool] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()

    def label(self, index: int) -> str:
        """A message's place in the row and its role."""
        place = self.labels[index] if index < len(self.labels) else f"messages[{index}]"
        return f"{place} ({self.messages[index]['role']})"


@dataclasses.dataclass(frozen=True)
class Completion:
    """A plain-text prompt and completion; only the completion is learned."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text, all of it learned."""

    text: str


@dataclasses.dataclass(frozen=True)
class Segments:
    """Texts of which only some are learned; nothing is put between them (Axolotl's input_output).

    Attributes:
        parts: each text, and whether it is learned.
    """

    parts: tuple[tuple[str, bool], ...]


Row = Chat | Completion | Segments | Text


def shorten(value: Any) -> str:
    """A value as an error message shows it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."
