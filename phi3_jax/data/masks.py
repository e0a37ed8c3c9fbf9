"""Tokenize rows in batches and mark which tokens the model learns.

A chat is rendered and its assistant turns are located (`spans`); the text is tokenized once. A turn
is learned from its first token to its last special token, the end of the turn, but not the line
break after it, nor the end-of-text token that some templates put after the last turn. Positions
decide, never token ids: a checkpoint whose padding token is its end token still learns to stop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from phi3_jax.data.rendering import ChatTemplate
from phi3_jax.data.rows import Chat, Completion, Row, RowError, Segments
from phi3_jax.data.spans import Layouts, assistant_spans, turn_tokens
from phi3_jax.data.words import WordTokenizer
from phi3_jax.errors import UserError

# The texts of a batch, in characters: more gains no speed, and a token takes about 100 bytes.
BATCH_CHARACTERS = 2**18


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        tokens: int32 `[n]`.
        targets: bool `[n]`; `targets[t]` means token t is to be predicted from the tokens before
            it, so `targets[0]` is always False.
        learns_first: whether token 0 is learned as well where another example precedes it.
    """

    tokens: np.ndarray
    targets: np.ndarray
    learns_first: bool = False


@dataclasses.dataclass(frozen=True)
class Learning:
    """Which tokens are learned: the keys of the same names in the config's section `data`."""

    assistant_only_loss: bool = True
    train_on: Literal["all", "last"] = "all"
    assistant_first: Literal["learn", "refuse"] = "learn"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenized row, not truncated.

    Attributes:
        ids: int32 `[n]`, token ids.
        learned: what is learned, as ascending half-open ranges of positions.
    """

    ids: np.ndarray
    learned: list[tuple[int, int]]

    def example(self) -> Example:
        """The row as arrays."""
        targets = np.zeros(len(self.ids), bool)
        for start, stop in self.learned:
            targets[max(start, 1) : stop] = True
        return Example(self.ids, targets, self.learned[0][0] == 0)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A row that is ready to be tokenized.

    Attributes:
        texts: what is tokenized, each alone.
        add_special_tokens: whether the tokenizer adds its special tokens.
        finish: makes the tokens from the encodings of the texts.
        finish_fast: the same from the ids alone, int32 `[n]`, which take less time without
            positions in the text; None, as its result is, where they are needed.
    """

    texts: tuple[str, ...]
    add_special_tokens: bool
    finish: Callable[[Sequence[tokenizers.Encoding]], Tokens]
    finish_fast: Callable[[np.ndarray], Tokens | None] | None = None


def encode(row: Row, template: ChatTemplate, learning: Learning) -> Example:
    """Tokens and targets of one row, not truncated; arguments and errors as in `draft`."""
    (found,) = tokenize([draft(row, template, learning)], template.tokenizer)
    if isinstance(found, RowError):
        raise found
    return found.example()


def draft(
    row: Row, template: ChatTemplate, learning: Learning, layouts: Layouts | None = None
) -> Draft:
    """Render one row.

    Args:
        row: a parsed row; a chat has to be prepared by the template.
        template: the checkpoint's chat template and tokenizer.
        learning: learn only the assistant's turns (for prompt and completion rows, the
            completion), all of them or the last; otherwise learn every token but the first.
        layouts: the template's layouts, which spare rendering each chat turn by turn.

    Raises:
        RowError: the chat has nothing to learn, the template rejects it, or masks cannot be
            derived from the template.
        UserError: there is no chat template.
    """
    tokenizer = template.tokenizer
    if isinstance(row, Chat):
        return _draft_chat(row, template, learning, layouts)
    if isinstance(row, Completion):
        learn_from = len(row.prompt) if learning.assistant_only_loss else None
        return _draft_text(row.prompt + row.completion, learn_from, tokenizer)
    if isinstance(row, Segments):
        return _draft_segments(row, learning)
    return _draft_text(row.text, None, tokenizer)


def tokenize(
    drafts: Sequence[Draft],
    tokenizer: PreTrainedTokenizerBase,
    words: WordTokenizer | None = None,
) -> list[Tokens | RowError]:
    """The tokens of each draft, or why it has none; the texts are tokenized in batches.

    Args:
        drafts: the rows.
        tokenizer: the tokenizer.
        words: what gives the same ids in less time, for a tokenizer that has it.
    """
    # A first call turns off truncation and padding, which a tokenizer.json may ask for; then the
    # lists that transformers makes of every encoding are spared.
    tokenizer("")
    backend = tokenizer.backend_tokenizer
    found: dict[int, Tokens | RowError] = {}
    for index, one in enumerate(drafts):
        if problem := _lone_surrogate(one.texts):
            found[index] = problem
    fast = [i for i, one in enumerate(drafts) if one.finish_fast and i not in found]
    for batch in _batches(drafts, fast):
        texts = [drafts[i].texts[0] for i in batch]
        for index, ids in zip(batch, _ids(texts, backend, words), strict=True):
            finish = drafts[index].finish_fast
            tokens = None if finish is None else finish(ids)
            if tokens is not None:
                found[index] = _checked(tokens)
    for special in (False, True):
        left = [i for i, one in enumerate(drafts) if one.add_special_tokens == special]
        for batch in _batches(drafts, [i for i in left if i not in found]):
            texts = [text for i in batch for text in drafts[i].texts]
            own = iter(backend.encode_batch(texts, add_special_tokens=special))
            for index in batch:
                encoded = [next(own) for _ in drafts[index].texts]
                try:
                    found[index] = _checked(drafts[index].finish(encoded))
                except RowError as error:
                    found[index] = error
    return [found[index] for index in range(len(drafts))]


def _ids(
    texts: list[str], backend: tokenizers.Tokenizer, words: WordTokenizer | None
) -> list[np.ndarray]:
    """int32, the ids of texts without the tokens that the tokenizer puts around them."""
    found = [None if words is None else words.encode(text) for text in texts]
    left = [text for text, ids in zip(texts, found, strict=True) if ids is None]
    rest = iter(backend.encode_batch_fast(left, add_special_tokens=False) if left else ())
    return [np.array(next(rest).ids, np.int32) if ids is None else ids for ids in found]


def _batches(drafts: Sequence[Draft], chosen: Sequence[int]) -> Iterator[list[int]]:
    """These drafts, in batches of about `BATCH_CHARACTERS`."""
    batch: list[int] = []
    size = 0
    for index in chosen:
        batch.append(index)
        size += sum(map(len, drafts[index].texts))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _checked(tokens: Tokens) -> Tokens | RowError:
    """Tokens with something to learn, in runs that do not touch."""
    learned: list[tuple[int, int]] = []
    for start, stop in tokens.learned:
        if learned and start == learned[-1][1]:  # a template without a header for the second turn
            learned[-1] = (learned[-1][0], stop)
        elif stop > start:
            learned.append((start, stop))
    if not learned or learned[-1][1] == 1:  # nothing precedes the first token
        return RowError("nothing to learn in this row", "nothing to learn")
    return Tokens(tokens.ids, learned)


def _lone_surrogate(texts: Sequence[str]) -> RowError | None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = text[error.start].encode("unicode_escape").decode()
            return RowError(f"a lone surrogate, {lone} (half of a character)")
    return None


def _learned_turns(chat: Chat, learning: Learning) -> list[int]:
    """Indices of the assistant's messages to learn.

    Raises:
        RowError: there is none, or the row asks for what cannot be done.
    """
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    turns = [i for i in turns if i >= chat.learn_from]
    for i, flag in chat.flags.items():
        if flag and i not in turns:
            raise RowError(f"{chat.label(i)} is marked as learned, but only assistant turns can be")
    if not turns:
        raise RowError("no assistant turn to learn", "nothing to learn")
    if learning.train_on == "last":
        turns = turns[-1:]
    turns = [i for i in turns if chat.flags.get(i, True)]
    if not turns:
        raise RowError("every turn is marked as not learned", "nothing to learn")
    return turns


def _unlearned_turns(chat: Chat) -> list[int]:
    """Indices of the messages that are not to be learned where all others are."""
    turns = sorted(i for i, flag in chat.flags.items() if not flag)
    for i in turns:
        if chat.messages[i]["role"] != "assistant":
            raise RowError(
                f"{chat.label(i)} asks not to be learned, and data.assistant_only_loss: false "
                "learns all turns; only an assistant turn can be left out"
            )
    return turns


def _draft_chat(
    chat: Chat, template: ChatTemplate, learning: Learning, layouts: Layouts | None
) -> Draft:
    spoken = [message["role"] for message in chat.messages if message["role"] != "system"]
    if learning.assistant_first == "refuse" and spoken[:1] == ["assistant"]:
        raise RowError(
            "the chat begins with an assistant turn (data.assistant_first: learn accepts it)"
        )
    text = template.render(chat)
    masked = learning.assistant_only_loss
    every = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    located = layouts.locate(chat, every, text) if layouts else None
    anchors = None if located is None else located.anchors
    if located is None:
        template.require_contents(chat, text)
    turns = _learned_turns(chat, learning) if masked else _unlearned_turns(chat)
    spans = (
        assistant_spans(chat, turns, text, template)
        if located is None
        else [span for i, span in zip(every, located.spans, strict=True) if i in turns]
    )

    def finish(encodings: Sequence[tokenizers.Encoding]) -> Tokens:
        (encoding,) = encodings
        ids = np.array(encoding.ids, np.int32)
        inside = [turn_tokens(span, encoding, ids, template) for span in spans]
        return Tokens(ids, inside if masked else _outside(inside, len(ids)))

    def finish_fast(ids: np.ndarray) -> Tokens | None:
        inside = None if anchors is None else anchors.find(ids, turns)
        if inside is None:
            return None
        return Tokens(ids, inside if masked else _outside(inside, len(ids)))

    # The template already includes all special tokens.
    return Draft((text,), False, finish, None if anchors is None else finish_fast)


def _outside(ranges: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """What is between ascending ranges of positions."""
    found, position = [], 0
    for start, stop in ranges:
        found.append((position, start))
        position = stop
    return [*found, (position, length)]


def _draft_text(text: str, learn_from: int | None, tokenizer: PreTrainedTokenizerBase) -> Draft:
    """Plain text plus the special tokens the tokenizer adds; the end token is learned too.

    Args:
        text: the text.
        learn_from: the first character that is learned; None learns the tokenizer's tokens too.
        tokenizer: the checkpoint's tokenizer.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no eos_token to end a text")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    has_bos = bos is not None and text.startswith(tokenizer.bos_token)

    def finish(encodings: Sequence[tokenizers.Encoding]) -> Tokens:
        (encoding,) = encodings
        ids = encoding.ids
        learned = np.ones(len(ids), bool)
        if learn_from is not None:
            starts, stops = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
            # A token may begin with the prompt's last space: ` yes` of `A: ` and `yes`.
            learned = (starts >= learn_from) | (stops > learn_from)
            learned &= np.asarray(encoding.special_tokens_mask) == 0
        if has_bos and ids[:2] == [bos, bos]:
            # The text has the token that the tokenizer adds.
            ids, learned = ids[1:], learned[1:]
        if ids[-2:] == [eos, eos] and encoding.special_tokens_mask[-1]:
            ids, learned = ids[:-1], learned[:-1]
        if not ids or ids[-1] != eos:
            ids, learned = [*ids, eos], np.append(learned, True)
        learned[-1] = True
        return Tokens(np.array(ids, np.int32), runs_of(learned))

    return Draft((text,), True, finish)


def _draft_segments(row: Segments, learning: Learning) -> Draft:
    """Each text tokenized alone, and no token added, as Axolotl does."""

    def finish(encodings: Sequence[tokenizers.Encoding]) -> Tokens:
        ids: list[int] = []
        learned = []
        for encoding, (_, label) in zip(encodings, row.parts, strict=True):
            if label or not learning.assistant_only_loss:
                learned.append((len(ids), len(ids) + len(encoding)))
            ids += encoding.ids
        return Tokens(np.array(ids, np.int32), learned)

    return Draft(tuple(text for text, _ in row.parts), False, finish)


def runs_of(flags: np.ndarray) -> list[tuple[int, int]]:
    """The ranges of positions where bool `[n]` flags are set."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
