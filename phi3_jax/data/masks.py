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

import numpy as np
from transformers import PreTrainedTokenizerBase

from phi3_jax.data.rendering import render
from phi3_jax.data.rows import Chat, Completion, Message, Row, RowError, Text
from phi3_jax.errors import UserError

# A turn that could follow an assistant turn; only where the two renderings diverge matters.
NEXT_TURN: Message = {"role": "user", "content": "?"}


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


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, assistant_only_loss: bool) -> Example:
    """Tokens and targets of one row, not truncated.

    Args:
        row: a parsed row.
        tokenizer: the checkpoint's tokenizer.
        assistant_only_loss: learn only the assistant's turns (for prompt and completion rows, the
            completion); otherwise learn every token but the first.

    Raises:
        RowError: the chat has nothing to learn, or the template rejects it.
        UserError: masks cannot be derived from the template.
    """
    if isinstance(row, Chat):
        example = _encode_chat(row, tokenizer, assistant_only_loss)
    elif isinstance(row, Completion):
        example = _encode_text(row.prompt + row.completion, len(row.prompt), tokenizer)
    else:
        example = _encode_text(row.text, 0, tokenizer)
    if not assistant_only_loss or isinstance(row, Text):
        example.targets[:] = True
    example.targets[:1] = False  # nothing precedes it
    if not example.targets.any():
        raise RowError("there is nothing to learn in it")
    return example


def assistant_spans(chat: Chat, text: str, tokenizer: PreTrainedTokenizerBase) -> list[range]:
    """Character ranges of the assistant's turns in `text`, including their end-of-turn tokens.

    A range may end inside the token after the turn, or after whitespace that follows the turn.

    Args:
        chat: the chat.
        text: its rendering.
        tokenizer: the tokenizer with the chat template.

    Raises:
        RowError: the chat begins with the assistant, or has no assistant turn to learn.
        UserError: the template renders a turn differently when other turns follow it.
    """
    messages = chat.messages
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < chat.learn_from:
            continue
        if i == 0:
            raise RowError("the chat begins with an assistant turn; a user turn must stand first")
        begin = render(messages[:i], tokenizer, add_generation_prompt=True)
        through = text if i + 1 == len(messages) else render(messages[: i + 1], tokenizer)
        followed = text if i + 1 < len(messages) else render([*messages, NEXT_TURN], tokenizer)
        end = len(os.path.commonprefix([through, followed]))
        if not text.startswith(begin) or end < len(begin):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} cannot be masked: it writes turn "
                f"{i + 1} otherwise when others follow, so what belongs to the assistant cannot be "
                "told; set data.assistant_only_loss: false, or use another template"
            )
        spans.append(range(len(begin), end))
    if not spans:
        raise RowError("there is no assistant turn to learn")
    return spans


def _encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, masked: bool) -> Example:
    text = render(chat.messages, tokenizer)
    # The template already includes all special tokens.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = np.asarray(encoding["input_ids"], np.int32)
    targets = np.zeros(len(tokens), bool)
    if masked:
        starts, ends = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2).T
        special = np.isin(tokens, _special_ids(tokenizer))
        for span in assistant_spans(chat, text, tokenizer):
            inside = (starts >= span.start) & (ends <= span.stop)
            closing = np.flatnonzero(inside & special)
            if not closing.size:
                raise UserError(
                    f"the chat template of {tokenizer.name_or_path} puts no special token after an "
                    "assistant turn, so the model could not learn to stop; use another template"
                )
            targets |= inside
            targets[closing[-1] + 1 :] = False
    return Example(tokens, targets)


def _encode_text(text: str, learn_from: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Plain text plus the special tokens the tokenizer adds; the end token is learned too."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no eos_token to end a text")
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    tokens = np.asarray(encoding["input_ids"], np.int32)
    starts = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
    targets = (starts >= learn_from) & (np.asarray(encoding["special_tokens_mask"]) == 0)
    if not len(tokens) or tokens[-1] != tokenizer.eos_token_id:
        tokens = np.append(tokens, np.int32(tokenizer.eos_token_id))
        targets = np.append(targets, True)
    targets[-1] = True
    return Example(tokens, targets)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all special tokens, including those without a role (such as Phi-3's `<|end|>`)."""
    added = tokenizer.added_tokens_decoder.items()
    return sorted({*tokenizer.all_special_ids, *(i for i, token in added if token.special)})
