"""Prompts: from text to token ids, and how many new tokens each has room for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from phi3_jax.data.rendering import render
from phi3_jax.errors import UserError
from phi3_jax.model.config import Phi3Config


def encode_chat(chat: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a chat up to where the answer begins, as the chat template writes it.

    Without a template, the ids of the last message alone, see `encode_text`.

    Raises:
        UserError: the template rejects the chat, or a text that is not valid Unicode.
    """
    for message in chat:
        require_unicode(message["content"], f"the {message['role']} message")
    if not tokenizer.chat_template:
        return encode_text(chat[-1]["content"], tokenizer)
    text = render(chat, tokenizer, add_generation_prompt=True)
    # The template has written every special token.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text that is to be continued, with what the tokenizer puts before it.

    What the tokenizer adds after a text is left out: nothing continues an end-of-text token.

    Raises:
        UserError: a text that is not valid Unicode.
    """
    require_unicode(text, "the prompt")
    ids = list(tokenizer(text)["input_ids"])
    return ids[: len(ids) - _added_after(tokenizer)]


def require_unicode(text: str, what: str) -> None:
    """Check that a text can be encoded: bytes that are not UTF-8 reach Python as lone surrogates.

    Raises:
        UserError: a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text[max(error.start - 20, 0) : error.start + 20]
        raise UserError(
            f"{what} is not valid UTF-8, near {shown.encode(errors='backslashreplace').decode()!r}"
        ) from None


def rooms(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: Phi3Config) -> list[int]:
    """How many new tokens each prompt has room for: at most `max_new_tokens`, at least 0."""
    positions = config.max_position_embeddings
    return [max(min(positions - len(prompt), max_new_tokens), 0) for prompt in prompts]


def prompt_problems(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], config: Phi3Config
) -> list[str]:
    """What is wrong with token ids that are to be continued, one line per problem.

    Args:
        prompts: token ids, one list per prompt.
        limits: maximum new tokens of each prompt.
        config: the model's architecture.
    """
    problems = [] if prompts else ["no prompts"]
    if len(limits) != len(prompts):
        problems.append(f"max_new_tokens has {len(limits)} numbers for {len(prompts)} prompts")
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=False)):
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if not len(prompt):
            problems.append(f"prompt {row} is empty")
        if outside:
            problems.append(
                f"prompt {row}: token ids {outside[:5]} are outside the vocabulary of "
                f"{config.vocab_size}; is this the model's own tokenizer?"
            )
        if len(prompt) + limit > config.max_position_embeddings:
            problems.append(
                f"prompt {row}: {len(prompt)} tokens and {limit} new ones exceed the "
                f"model's {config.max_position_embeddings} positions"
            )
    if min(limits, default=1) < 1:
        problems.append(f"max_new_tokens must be at least 1, not {min(limits)}")
    return problems


def _added_after(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer adds after a text (`add_eos_token`), usually none."""
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return next((n for n, added in enumerate(reversed(mask)) if not added), 0)
