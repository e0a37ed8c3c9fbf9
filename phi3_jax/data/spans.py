"""Where each assistant turn is in a rendered chat.

The Phi family's chat templates have no generation markers, so the boundaries of an assistant turn
are found by rendering the chat turn by turn with the checkpoint's own template:

- a turn begins where the rendering of the turns before it, including the generation prompt, ends;
- it ends where the renderings with and without a following turn diverge.

Both are positions in the rendering of the whole chat. The code never searches for text, so user
text cannot shift the mask. Most chats of a data set differ in their words only: for those the
positions are found once, in a chat of markers, and then follow from the lengths of the contents.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers

from phi3_jax.data.markers import marker
from phi3_jax.data.rendering import MAX_SHAPES, ChatTemplate, shape_of
from phi3_jax.data.rows import Chat, Message, RowError

# A turn that could follow an assistant turn; only where the two renderings diverge matters.
NEXT_TURN: Message = {"role": "user", "content": "?"}
# Stands for the content of a chat's first turn, to find where the content begins.
FIRST = "QZFIRSTX7"


def assistant_spans(chat: Chat, turns: list[int], text: str, template: ChatTemplate) -> list[range]:
    """Character ranges of assistant turns in `text`, including their end-of-turn tokens.

    A range may end inside the token after the turn, or after whitespace that follows the turn.

    Args:
        chat: the chat, prepared by the template.
        turns: indices of the assistant's messages that are wanted.
        text: the chat's rendering.
        template: the chat template.

    Raises:
        RowError: the template renders a turn differently when other turns follow it.
    """
    spans = []
    last = len(chat.messages) - 1
    longer = dataclasses.replace(chat, messages=[*chat.messages, NEXT_TURN])
    for i in turns:
        begin = (
            template.render(chat, i, add_generation_prompt=True) if i else _opening(chat, template)
        )
        through = text if i == last else template.render(chat, i + 1)
        followed = text if i < last else template.render(longer)
        end = len(os.path.commonprefix([through, followed]))
        if not text.startswith(begin) or end < len(begin):
            raise RowError(
                f"the chat template of {template.tokenizer.name_or_path} cannot be masked: it "
                f"renders {chat.label(i)} differently when other turns follow, so the assistant's "
                "tokens cannot be identified; set data.assistant_only_loss: false, or use a "
                "different template",
                "impossible to mask",
            )
        spans.append(range(len(begin), end))
    return spans


def _opening(chat: Chat, template: ChatTemplate) -> str:
    """What the template writes before the content of a first turn.

    No chat without turns can be rendered, so the content is found by a mark in its place.
    """
    first = chat.messages[0]
    if not isinstance(first.get("content"), str) or not first["content"].strip():
        raise RowError(
            f"{chat.label(0)}: a chat can begin with the assistant only if that turn has a content",
            "impossible to mask",
        )
    marked = [{**first, "content": FIRST}, *chat.messages[1:]]
    return template.render(dataclasses.replace(chat, messages=marked)).partition(FIRST)[0]


def turn_tokens(
    span: range,
    encoding: tokenizers.Encoding,
    ids: Sequence[int] | np.ndarray,
    template: ChatTemplate,
) -> tuple[int, int]:
    """The tokens of a turn, as a half-open range, with its end-of-turn token.

    Raises:
        RowError: the turn does not end with a special token.
    """
    start = _first_token(encoding, lambda first, _: first >= span.start)
    stop = _first_token(encoding, lambda _, last: last > span.stop)
    while stop > start and ids[stop - 1] not in template.special_ids:
        stop -= 1
    if stop <= start:
        raise RowError(
            f"the chat template of {template.tokenizer.name_or_path} puts no special token "
            "after an assistant turn, so the model could not learn to stop; use a different "
            "template",
            "impossible to mask",
        )
    return start, stop


def _first_token(encoding: tokenizers.Encoding, holds: Callable[[int, int], bool]) -> int:
    """Index of the first token whose range of characters fulfills what the later ones do too."""
    low, high = 0, len(encoding)
    while low < high:
        middle = (low + high) // 2
        offsets = encoding.token_to_chars(middle)
        assert offsets is not None
        if holds(*offsets):
            high = middle
        else:
            low = middle + 1
    return low


@dataclasses.dataclass(frozen=True)
class Anchors:
    """The special tokens around each assistant turn, in chats of one shape.

    Where a turn begins right after a special token and ends with one, its tokens are found by
    counting special tokens, without their positions in the text.

    Attributes:
        sequence: the special tokens of a chat, in order.
        turns: by the index of an assistant's message, which of them stand before it and at its end.
    """

    sequence: tuple[int, ...]
    turns: dict[int, tuple[int, int]]

    def find(self, ids: np.ndarray, turns: Sequence[int]) -> list[tuple[int, int]] | None:
        """The tokens of these turns, as half-open ranges; None if a content has such a token."""
        found = np.flatnonzero(np.isin(ids, self.sequence))
        if ids[found].tolist() != list(self.sequence):
            return None
        places = found.tolist()
        return [
            (places[before] + 1, places[end] + 1) for before, end in (self.turns[i] for i in turns)
        ]


@dataclasses.dataclass(frozen=True)
class Located:
    """The spans of some turns, and how to find their tokens by counting, where that is possible."""

    spans: list[range]
    anchors: Anchors | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a template writes chats of one shape: constant pieces around the contents.

    Attributes:
        pieces: what stands before each content, and after the last one.
        spans: by the index of an assistant's message, how far its span begins before its content,
            and how far it ends after it.
        anchors: the special tokens around them.
    """

    pieces: tuple[str, ...]
    spans: dict[int, tuple[int, int]]
    anchors: Anchors | None

    def find(self, contents: Sequence[str], turns: Sequence[int], text: str) -> list[range] | None:
        """The spans of these turns in a rendering; None if it does not have this layout."""
        parts: list[str] = [*self.pieces, *self.pieces[:-1]]
        parts[::2] = self.pieces
        parts[1::2] = contents
        if "".join(parts) != text:
            return None
        found, wanted, position = [], set(turns), 0
        for i, content in enumerate(contents):
            start = position + len(self.pieces[i])
            position = start + len(content)
            if i in wanted:
                before, after = self.spans[i]
                found.append(range(start - before, position + after))
        return found


class Layouts:
    """The layouts that a template gives to chats of the shapes seen so far."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._known: dict[tuple[Any, ...], Layout | None] = {}

    def locate(self, chat: Chat, turns: list[int], text: str) -> Located | None:
        """As `assistant_spans`; None for a chat that does not follow a layout.

        A span is also a proof that the template wrote every content whole.
        """
        contents = [message.get("content") for message in chat.messages]
        texts = [content for content in contents if isinstance(content, str)]
        plain = not chat.tools and not any("tool_calls" in message for message in chat.messages)
        if not plain or len(texts) < len(contents):
            return None
        key = shape_of(chat)
        if key not in self._known:
            if len(self._known) >= MAX_SHAPES:
                self._known.clear()
            self._known[key] = _layout(chat, self.template)
        layout = self._known[key]
        if layout is None:
            return None
        found = layout.find(texts, turns, text)
        if found is None:  # some templates trim the contents
            found = layout.find([content.strip() for content in texts], turns, text)
        return None if found is None else Located(found, layout.anchors)


def _layout(chat: Chat, template: ChatTemplate) -> Layout | None:
    """The layout of a chat's shape; None if it has none that depends on the shape alone."""
    marks = [marker(i) for i in range(len(chat.messages))]
    messages = [{**m, "content": mark} for m, mark in zip(chat.messages, marks, strict=True)]
    marked = dataclasses.replace(chat, messages=messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        text = template.render(marked)
        spans = assistant_spans(marked, turns, text, template)
    except RowError:
        return None
    pieces, starts, position = [], [], 0
    for mark in marks:
        start = text.find(mark, position)
        if start < 0 or text.count(mark) > 1:
            return None
        pieces.append(text[position:start])
        starts.append(start)
        position = start + len(mark)
    pieces.append(text[position:])
    offsets = {}
    for i, span in zip(turns, spans, strict=True):
        before, after = starts[i] - span.start, span.stop - starts[i] - len(marks[i])
        # A span that reaches another content would depend on its words.
        room = len(pieces[i + 1]) - (i + 1 < len(marks))
        if not (0 <= before <= len(pieces[i]) and 0 <= after <= room):
            return None
        offsets[i] = (before, after)
    return Layout(
        tuple(pieces), offsets, _anchors(dict(zip(turns, spans, strict=True)), text, template)
    )


def _anchors(spans: dict[int, range], text: str, template: ChatTemplate) -> Anchors | None:
    """The special tokens of a chat of markers; None if a turn does not begin and end with one.

    Raises:
        RowError: the template writes half of a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # the markers have none
        problem = "the chat template writes a lone surrogate (half of a character)"
        raise RowError(problem, "refused by the template") from None
    encoding = template.tokenizer(text, add_special_tokens=False).encodings[0]
    ids = encoding.ids
    places = [place for place, token in enumerate(ids) if token in template.special_ids]
    order = {place: number for number, place in enumerate(places)}
    turns = {}
    for i, span in spans.items():
        try:
            start, stop = turn_tokens(span, encoding, ids, template)
        except RowError:
            return None
        if start - 1 not in order or stop - 1 not in order:
            return None
        turns[i] = (order[start - 1], order[stop - 1])
    return Anchors(tuple(ids[place] for place in places), turns)
