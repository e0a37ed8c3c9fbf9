"""Render chats with the chat template that the checkpoint ships."""

from __future__ import annotations

import jinja2
from transformers import PreTrainedTokenizerBase

from phi3_jax.data.rows import Message, RowError
from phi3_jax.errors import UserError


def render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> str:
    """Render the chat with the checkpoint's template.

    Raises:
        RowError: the template rejects these messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template; use prompt and completion or text, or a "
            "checkpoint that has been trained on chats"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
        raise RowError(f"the chat template refuses it: {error}") from None
