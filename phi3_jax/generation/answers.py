"""Answers to any number of prompts, and to the config's sample prompts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import lora_flax
from phi3_jax.data.masks import Learning, encode
from phi3_jax.data.rendering import ChatTemplate
from phi3_jax.data.rows import Chat
from phi3_jax.errors import UserError
from phi3_jax.generation.generate import generate
from phi3_jax.generation.prompts import encode_chat, rooms
from phi3_jax.model.checks import is_tokens, shown
from phi3_jax.model.config import read_json_object
from phi3_jax.model.network import Phi3


def stop_ids(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All token ids that end an answer: the checkpoint's own list and the template's end-of-turn.

    Phi-3's tokenizer declares `<|endoftext|>` as EOS, but its answers end with `<|end|>`.

    Raises:
        UserError: the checkpoint's generation_config.json is damaged.
    """
    found: set[int] = set()
    file = model_dir / "generation_config.json"
    if file.exists():
        eos: Any = read_json_object(file).get("eos_token_id")
        ids = tuple(eos) if isinstance(eos, list) else eos
        if not is_tokens(ids):
            raise UserError(f"{file}: eos_token_id must be null or token ids, not {shown(eos)}")
        found |= set(ids if isinstance(ids, tuple) else () if ids is None else (ids,))
    found.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        example = encode(Chat(turns), ChatTemplate(tokenizer), Learning())
        found.add(int(example.tokens[example.targets][-1]))
    return sorted(id for id in found if id is not None)


def generate_batched(
    model: Phi3,
    prompts: Sequence[Sequence[int]],
    rows: int,
    max_new_tokens: int,
    poll: Callable[[], None] = lambda: None,
    seed: int = 0,
    **settings: Any,
) -> list[list[int] | None]:
    """`generate` for any number of prompts, `rows` at a time; `settings` are passed through.

    Args:
        model: the model.
        prompts: token ids.
        rows: prompts per batch.
        max_new_tokens: maximum tokens per answer.
        poll: called before each batch; may raise.
        seed: seed for sampling of the first batch; each further one has the next.
        settings: further arguments of `generate`.

    Returns:
        The new tokens of each prompt, as many as there is room for (see `rooms`); None for a prompt
        that fills the model's positions by itself.
    """
    limits = rooms(prompts, max_new_tokens, model.config)
    # Batch prompts of similar length to reduce padding.
    order = sorted((i for i, limit in enumerate(limits) if limit), key=lambda i: -len(prompts[i]))
    answers: list[list[int] | None] = [None] * len(prompts)
    for number, first in enumerate(range(0, len(order), rows)):
        poll()
        chosen = order[first : first + rows]
        # A fixed batch shape, so one program serves all prompts of a bucket.
        padded = chosen + chosen[-1:] * (rows - len(chosen))
        batch, most = [prompts[i] for i in padded], [limits[i] for i in padded]
        new = generate(model, batch, most, seed=seed + number, **settings)
        for i, tokens in zip(chosen, new, strict=False):
            answers[i] = tokens
    return answers


def answer(
    model: Phi3,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    stops: list[int],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to user messages, using the chat template if there is one.

    Raises:
        UserError: a message that fills the model's positions by itself.
    """
    if not prompts:
        return []
    ids = [encode_chat([{"role": "user", "content": prompt}], tokenizer) for prompt in prompts]
    limits = [max(limit, 1) for limit in rooms(ids, max_new_tokens, model.config)]
    new = generate(model, ids, limits, eos_ids=stops)
    return [decode(tokens, tokenizer) for tokens in new]


def decode(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer, without special tokens and surrounding white space."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def write_samples(path: Path, records: list[dict[str, str]]) -> None:
    """Write one JSON line per prompt: `prompt`, `before`, and `after` if training has finished."""
    lora_flax.write_atomically(path, "".join(json.dumps(r) + "\n" for r in records))


def read_samples(path: Path) -> list[dict[str, str]]:
    """Read what `write_samples` wrote, without other lines; empty if the file does not exist."""
    if not path.is_file():  # a FIFO would never end
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [
        record
        for record in found
        if isinstance(record, dict)
        and "prompt" in record
        and all(isinstance(value, str) for value in record.values())
    ]
