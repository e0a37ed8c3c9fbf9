"""Render chats with the chat template that the checkpoint ships, and refuse what it would drop.

A template silently drops what it does not know: a role, the tools, the calls of a turn. To detect
this, the chat is rendered once more with a marker in place of each of these; a marker that is
missing from the output was dropped. Which markers appear depends on the shape of the chat (roles
and keys), hardly on its words, so the result is cached by shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from phi3_jax.data.markers import Tools, function_of, mark, mark_tools, marker
from phi3_jax.data.messages import FLAGS
from phi3_jax.data.rows import Chat, Message, RowError
from phi3_jax.errors import UserError

# Shapes remembered; a data set of short chats has a few dozen.
MAX_SHAPES = 10_000
# Seconds for one chat, which takes less than a thousandth of one.
TIME_LIMIT = 10.0


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool = False,
    tools: Tools | None = None,
) -> str:
    """Render the chat with the checkpoint's template.

    Raises:
        RowError: the template rejects these messages.
        UserError: there is no template, or it does not end within `TIME_LIMIT`.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template; use prompt and completion or text, or a "
            "checkpoint that has been trained on chats"
        )
    try:
        with _time_limit():
            return str(
                tokenizer.apply_chat_template(
                    list(messages),
                    tools=None if tools is None else [*tools],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
    except _TooLong:
        raise UserError(
            f"the chat template took over {TIME_LIMIT:.0f} s for one chat; it may have a loop "
            "without end"
        ) from None
    except RecursionError:
        raise RowError("nested too deeply for the chat template", "malformed") from None
    except Exception as error:  # a template is a program of its own, such as one that divides by 0
        raise RowError(
            f"the chat template rejects it: {str(error) or type(error).__name__}",
            "refused by the template",
        ) from None


class _TooLong(Exception):
    """A template ran out of time."""


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise `_TooLong` after `TIME_LIMIT`; in the main thread only, which gets the alarm."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a template does to chats of one shape.

    Attributes:
        lost: what the template leaves out, by the index of the message; -1 for the tools.
        blank: messages whose missing content has to be "" for this template.
    """

    lost: tuple[tuple[int, str], ...] = ()
    blank: tuple[int, ...] = ()


class ChatTemplate:
    """A tokenizer's chat template, with what it does to chats of the shapes seen so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._shapes: dict[tuple[Any, ...], Shape] = {}
        self._answers: dict[str, bool] = {}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens, including those without a role (such as Phi-3's `<|end|>`)."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids).union(
            i for i, token in added if token.special
        )

    def render(
        self, chat: Chat, count: int | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The first `count` messages of a prepared chat; all of them by default."""
        return render(chat.messages[:count], self.tokenizer, add_generation_prompt, chat.tools)

    def prepare(self, chat: Chat) -> Chat:
        """The chat as this template takes it, with nothing that it would drop.

        Lists of text parts become text, tools go where the template reads them, and a missing
        content becomes empty, each only where the template needs it.

        Raises:
            RowError: the template would drop a part of it; the message lists all of them.
        """
        messages = [self._join_parts(message) for message in chat.messages]
        chat = self._place_tools(dataclasses.replace(chat, messages=messages))
        shape = self._shape(chat)
        if shape.blank:
            messages = list(chat.messages)
            for index in shape.blank:
                messages[index] = {"content": "", **messages[index]}
            chat = dataclasses.replace(chat, messages=messages)
        _refuse(chat, shape.lost)
        return chat

    def require_contents(self, chat: Chat, text: str) -> None:
        """Check that a rendering holds each content whole.

        Raises:
            RowError: a content that is not there, not even rewritten between its two ends.
        """
        contents = [_content(message).strip() for message in chat.messages]
        missing = [i for i, content in enumerate(contents) if content and content not in text]
        if not missing:
            return
        # Rewritten (escaped, in upper case) or cut? Markers at both ends show which.
        messages = list(chat.messages)
        for i in missing:
            if isinstance(messages[i]["content"], str):
                marked = marker(2 * i) + messages[i]["content"] + marker(2 * i + 1)
                messages[i] = {**messages[i], "content": marked}
        shown = render(messages, self.tokenizer, False, chat.tools).upper()
        ends = {i: (marker(2 * i), marker(2 * i + 1)) for i in missing}
        cut = [i for i in missing if not all(end in shown for end in ends[i])]
        _refuse(chat, tuple((i, "a part of its content") for i in cut if i in _strings(messages)))

    def unread_keys(self, chat: Chat) -> set[str]:
        """Keys of messages, as `key (role)`, that change nothing in the rendering."""
        known = {"role", "content", "tools", "tool_calls", *FLAGS}
        keys = {(m["role"], key) for m in chat.messages for key in m if key not in known}
        return {f"{key} ({role})" for role, key in keys if not self._reads(chat, role, key)}

    def _reads(self, chat: Chat, role: str, key: str) -> bool:
        """Whether removing a key changes the rendering; cached by role and key."""
        question = f"{role}.{key}"
        if question not in self._answers:
            without = [
                {k: v for k, v in message.items() if message["role"] != role or k != key}
                for message in chat.messages
            ]
            try:
                other = render(without, self.tokenizer, False, chat.tools)
            except RowError:
                other = ""
            self._answers[question] = other != self.render(chat)
        return self._answers[question]

    def _writes(self, sign: str, messages: list[Message], tools: Tools | None = None) -> bool:
        """Whether a marker appears in a rendering; cached by marker."""
        if sign not in self._answers:
            try:
                shown = render(messages, self.tokenizer, False, tools)
            except RowError:
                shown = ""
            # A list of parts that was printed rather than read has its keys in the text.
            self._answers[sign] = sign in shown and "'text':" not in shown
        return self._answers[sign]

    def _join_parts(self, message: Message) -> Message:
        """A content of text parts as the template takes it: as it is, or joined by line breaks."""
        content = message.get("content")
        if not isinstance(content, list):
            return message
        sign = marker(0, "P")
        parts = [{"type": "text", "text": sign}, {"type": "text", "text": "?"}]
        if self._writes(sign, [{"role": "user", "content": parts}]):
            return message
        # As vLLM joins them for such templates.
        return {**message, "content": "\n".join(part["text"] for part in content)}

    def _place_tools(self, chat: Chat) -> Chat:
        """Put the tools as JSON text into the system message, if the template reads them there."""
        messages = chat.messages
        if not chat.tools and not any("tools" in message for message in messages):
            return chat
        user, sign = {"role": "user", "content": "?"}, marker(0, "S")
        system = {"role": "system", "content": "?", "tools": sign}
        in_system = self._writes(sign, [system, user])
        if in_system:
            messages = [_tools_as_text(message) for message in messages]
            chat = dataclasses.replace(chat, messages=messages)
        if not chat.tools or not in_system:
            return chat
        if self._writes(marker(0, "T"), [user], mark_tools(chat.tools)):
            return chat
        first = messages[0]
        if first["role"] != "system":
            raise RowError(
                "tools: this chat template reads them in the system message, and there is none",
                "lost by the template",
            )
        if first.get("tools", chat.tools_text) != chat.tools_text:
            raise RowError(f"the row's tools differ from those in {chat.label(0)}")
        messages = [{**first, "tools": chat.tools_text}, *messages[1:]]
        return dataclasses.replace(chat, messages=messages, tools=None)

    def _shape(self, chat: Chat) -> Shape:
        key = shape_of(chat)
        if key not in self._shapes:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._probe(chat)
        return self._shapes[key]

    def _probe(self, chat: Chat) -> Shape:
        """Render the chat with markers, and see which show."""
        messages = [mark(i, message) for i, message in enumerate(chat.messages)]
        tools = mark_tools(chat.tools) if chat.tools else None
        blank: tuple[int, ...] = ()
        try:
            shown = render(messages, self.tokenizer, False, tools)
        except RowError as error:
            blank = tuple(i for i, message in enumerate(messages) if "content" not in message)
            if not blank:
                if error.kind != "refused by the template":
                    raise
                return Shape()  # rendering the chat itself says why
            for i in blank:
                messages[i] = {"content": "", **messages[i]}
            shown = render(messages, self.tokenizer, False, tools)
        shown = shown.upper()
        lost = [(-1, "tools")] if tools and marker(0, "T") not in shown else []
        for i, message in enumerate(chat.messages):
            calls = message.get("tool_calls") or ()
            if any(marker(i, f"C{n}") not in shown for n in range(len(calls))):
                lost.append((i, "tool_calls"))
            elif any(marker(i, f"A{n}") not in shown for n in range(len(calls))):
                lost.append((i, "the arguments of its tool_calls"))
            if message.get("tools") and marker(i, "M") not in shown:
                lost.append((i, "tools"))
            empty = not _content(message).strip()
            if marker(i) not in shown and not (empty and (calls or message["role"] == "system")):
                lost.append((i, "content"))
        return Shape(tuple(lost), blank)


def _refuse(chat: Chat, lost: Sequence[tuple[int, str]]) -> None:
    if lost:
        listed = [f"{chat.label(i)}: {what}" if i >= 0 else what for i, what in lost]
        raise RowError(
            f"the chat template does not write {'; '.join(listed)} (move it into a content that "
            "the template writes, or use a model whose template has it)",
            "lost by the template",
        )


def _content(message: Message) -> str:
    """The content as text; empty if there is none."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _strings(messages: Sequence[Message]) -> set[int]:
    return {i for i, message in enumerate(messages) if isinstance(message.get("content"), str)}


def shape_of(chat: Chat) -> tuple[Any, ...]:
    """What of a chat decides how a template writes it: all but its words."""
    return (bool(chat.tools), *map(_shape_of, chat.messages))


def _shape_of(message: Message) -> tuple[Any, ...]:
    calls = message.get("tool_calls") or ()
    return (
        message["role"],
        tuple(sorted(message)),
        type(message.get("content")),
        not _content(message).strip(),
        tuple(("function" in call, type(function_of(call).get("arguments"))) for call in calls),
    )


def _tools_as_text(message: Message) -> Message:
    tools = message.get("tools", "")
    if isinstance(tools, str):
        return message
    return {**message, "tools": json.dumps(tools, ensure_ascii=False)}
