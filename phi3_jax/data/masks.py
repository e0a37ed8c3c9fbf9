"""Tokenize chats and mark which tokens the model learns.

The Phi family's chat templates have no generation markers, so the boundaries of an assistant turn
are found by rendering the chat turn by turn with the checkpoint's own template:

- a turn begins where the rendering of the turns before it, including the generation prompt, ends;
- it ends where the renderings with and without a following turn diverge, minus anything after its
  last special token: the end-of-turn token is learned, but not the line break after it, nor the
  end-of-text token that some templates put after the last turn.

Both are positions in the rendering of the whole chat, which is tokenized once. The code never
searches for text or compares token ids with the padding id, so user text cannot shift the mask, and
a checkpoint whose padding token is its end token still learns to stop.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from phi3_jax.data.rendering import ChatTemplate
from phi3_jax.data.rows import Chat, Completion, Message, Row, RowError, Segments, Text
from phi3_jax.errors import UserError

# A turn that could follow an assistant turn; only where the two renderings diverge matters.
NEXT_TURN: Message = {"role": "user", "content": "?"}
# Stands for the content of a chat's first turn, to find where the content begins.
FIRST = "QZFIRSTX7"


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        tokens: int32 `[n]`.
        targets: bool `[n]`; `targets[t]` means token t is to be predicted from the tokens before
            it, so `targets[0]` is always False.
    """

    tokens: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Learning:
    """Which tokens are learned: the keys of the same names in the config's section `data`."""

    assistant_only_loss: bool = True
    train_on: Literal["all", "last"] = "all"
    assistant_first: Literal["learn", "refuse"] = "learn"


def encode(row: Row, template: ChatTemplate, learning: Learning) -> Example:
    """Tokens and targets of one row, not truncated.

    Args:
        row: a parsed row; a chat has to be prepared by the template.
        template: the checkpoint's chat template and tokenizer.
        learning: learn only the assistant's turns (for prompt and completion rows, the
            completion), all of them or the last; otherwise learn every token but the first.

    Raises:
        RowError: the chat has nothing to learn, the template rejects it, or masks cannot be
            derived from the template.
        UserError: there is no chat template.
    """
    tokenizer = template.tokenizer
    if isinstance(row, Chat):
        example = _encode_chat(row, template, learning)
    elif isinstance(row, Completion):
        example = _encode_text(row.prompt + row.completion, len(row.prompt), tokenizer)
    elif isinstance(row, Segments):
        example = _encode_segments(row, tokenizer)
    else:
        example = _encode_text(row.text, 0, tokenizer)
    plain = not isinstance(row, Chat)
    if plain and (not learning.assistant_only_loss or isinstance(row, Text)):
        example.targets[:] = True
    example.targets[:1] = False  # nothing precedes it
    if not example.targets.any():
        raise RowError("nothing to learn in this row", "nothing to learn")
    return example


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


def _encode_chat(chat: Chat, template: ChatTemplate, learning: Learning) -> Example:
    spoken = [message["role"] for message in chat.messages if message["role"] != "system"]
    if learning.assistant_first == "refuse" and spoken[:1] == ["assistant"]:
        raise RowError(
            "the chat begins with an assistant turn (data.assistant_first: learn accepts it)"
        )
    text = template.render(chat)
    template.require_contents(chat, text)
    # The template already includes all special tokens.
    encoding = _tokenize(text, template.tokenizer, add_special_tokens=False)
    tokens = np.asarray(encoding["input_ids"], np.int32)
    masked = learning.assistant_only_loss
    turns = _learned_turns(chat, learning) if masked else _unlearned_turns(chat)
    inside = _targets(chat, turns, text, encoding, template)
    return Example(tokens, inside if masked else ~inside)


def _targets(
    chat: Chat, turns: list[int], text: str, encoding: Any, template: ChatTemplate
) -> np.ndarray:
    """bool `[n]`: the tokens of these turns, with their end-of-turn tokens."""
    tokens = np.asarray(encoding["input_ids"], np.int32)
    starts, ends = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2).T
    targets = np.zeros(len(tokens), bool)
    special = np.isin(tokens, template.special_ids) if turns else targets
    for span in assistant_spans(chat, turns, text, template):
        inside = (starts >= span.start) & (ends <= span.stop)
        closing = np.flatnonzero(inside & special)
        if not closing.size:
            raise RowError(
                f"the chat template of {template.tokenizer.name_or_path} puts no special token "
                "after an assistant turn, so the model could not learn to stop; use a different "
                "template",
                "impossible to mask",
            )
        targets |= inside
        targets[closing[-1] + 1 :] = False
    return targets


def _encode_text(text: str, learn_from: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Plain text plus the special tokens the tokenizer adds; the end token is learned too."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no eos_token to end a text")
    encoding = _tokenize(text, tokenizer, return_special_tokens_mask=True)
    tokens = np.asarray(encoding["input_ids"], np.int32)
    starts = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
    targets = (starts >= learn_from) & (np.asarray(encoding["special_tokens_mask"]) == 0)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and text.startswith(tokenizer.bos_token) and list(tokens[:2]) == [bos, bos]:
        # The text has the token that the tokenizer adds.
        tokens, targets = tokens[1:], targets[1:]
    if len(tokens) > 1 and list(tokens[-2:]) == [eos, eos] and encoding["special_tokens_mask"][-1]:
        tokens, targets = tokens[:-1], targets[:-1]
    if not len(tokens) or tokens[-1] != eos:
        tokens = np.append(tokens, np.int32(eos))
        targets = np.append(targets, True)
    targets[-1] = True
    return Example(tokens, targets)


def _encode_segments(row: Segments, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Each text tokenized alone, and no token added, as Axolotl does."""
    parts = [
        np.asarray(_tokenize(text, tokenizer, add_special_tokens=False)["input_ids"], np.int32)
        for text, _ in row.parts
    ]
    learned = [np.full(len(ids), label) for ids, (_, label) in zip(parts, row.parts, strict=True)]
    return Example(np.concatenate(parts), np.concatenate(learned))


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase, **options: bool) -> Any:
    try:
        return tokenizer(text, return_offsets_mapping=True, **options)
    except (TypeError, UnicodeEncodeError):
        lone = [character for character in text if 0xD800 <= ord(character) <= 0xDFFF]
        if not lone:
            raise
        raise RowError(
            f"a lone surrogate, {lone[0].encode('unicode_escape').decode()} (half of a character)"
        ) from None
