"""The rows of a large JSON list, one at a time: the file need not fit in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from phi3_jax.data.json_text import Value, skip_space, value_at
from phi3_jax.data.rows import Source
from phi3_jax.errors import UserError

# How much is read at once, and what a row may take until the rest of the file is not JSON.
PIECE = 2**22
LONGEST = 2**28


def read_list(file: str, head: bytes, rest: BinaryIO) -> Iterator[Source]:
    """The rows of a list that begins with `head` and continues in `rest`.

    Args:
        file: the file's name, for errors.
        head: UTF-8, whose first character but white space is `[`.
        rest: what follows it.

    Raises:
        UserError: the list is not valid JSON, or something follows it.
    """
    text = _Text(file, head, rest)
    text.next_is("[")
    text.position += 1
    number = 0
    while not text.next_is("]"):
        if number:
            if not text.next_is(","):
                raise text.invalid("Expecting ',' delimiter")
            text.position += 1
        number += 1
        value, raw = text.value()
        problem = value.problem
        try:
            raw.encode()
        except UnicodeEncodeError:
            problem = problem or "not UTF-8"
        yield Source(f"{file}: row {number}", value.value, problem)
    text.position += 1
    if not text.is_at_end():
        raise text.invalid("Extra data")


class _Text:
    """A text of which only a part is in memory.

    Attributes:
        position: the next character, in that part.
    """

    def __init__(self, file: str, head: bytes, rest: BinaryIO) -> None:
        # Bytes that are not UTF-8 become lone surrogates, so that only their row is refused.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._file, self._rest, self._line = file, rest, 1
        self._part, self.position = self._decoder.decode(head), 0

    def next_is(self, character: str) -> bool:
        """Whether the next character, white space aside, is this one."""
        self.position = skip_space(self._part, self.position)
        while self.position == len(self._part) and self._more():
            self.position = skip_space(self._part, self.position)
        return self._part.startswith(character, self.position)

    def is_at_end(self) -> bool:
        """Whether only white space is left."""
        self.next_is("]")
        return self.position == len(self._part)

    def value(self) -> tuple[Value, str]:
        """The next value and its text."""
        self.next_is("]")
        while True:
            try:
                found = value_at(self._part, self.position)
                if found.end < len(self._part) or not self._more():
                    raw = self._part[self.position : found.end]
                    self.position = found.end
                    return found, raw
            except (json.JSONDecodeError, IndexError) as error:
                if len(self._part) - self.position > LONGEST or not self._more():
                    said = getattr(error, "msg", "Unexpected end")
                    raise self.invalid(said) from None

    def invalid(self, said: str) -> UserError:
        """The error of a text that is not JSON from here on."""
        line = self._line + self._part.count("\n", 0, self.position)
        return UserError(f"{self._file}:{line}: not valid JSON ({said})")

    def _more(self) -> bool:
        """Forget what is behind and read on; whether there was anything."""
        self._line += self._part.count("\n", 0, self.position)
        self._part, self.position = self._part[self.position :], 0
        piece = self._rest.read(max(PIECE, len(self._part)))
        self._part += self._decoder.decode(piece, final=not piece)
        return bool(piece)
