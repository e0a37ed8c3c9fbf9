"""The checkpoint's own tokenizer, from its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from phi3_jax.errors import UserError

if TYPE_CHECKING:  # the config needs JAX, and the worker processes do not
    from phi3_jax.config.data import DataConfig, NewToken


def load_tokenizer(
    directory: str | Path,
    chat_template_path: str | None = None,
    add_tokens: Sequence[NewToken] = (),
) -> PreTrainedTokenizerBase:
    """Load the checkpoint's own tokenizer from its local folder, without running remote code.

    Args:
        directory: the folder.
        chat_template_path: where its chat template comes from instead: a Jinja file, or the folder
            or hub id of another tokenizer.
        add_tokens: tokens to add, whose ids follow those of the known ones.

    Raises:
        UserError: no tokenizer found, or one that does not support character offsets; no chat
            template where one should be; a token to add that is known already.
    """
    folder = Path(directory)
    for file in folder.glob("*token*"):
        if file.is_fifo():  # reading it would never end
            raise UserError(f"{file}: not a regular file")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        if tokenizer.is_fast:
            # Some settings fail only when used, some vocabularies only for a character they lack.
            tokenizer("a \ue000", return_offsets_mapping=True)
    except Exception as error:  # a damaged file raises nearly anything in transformers
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{directory}: cannot load a tokenizer ({type(error).__name__}: {first_line})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: a tokenizer.json is needed (a 'fast' tokenizer)")
    if chat_template_path is not None:
        tokenizer.chat_template = _read_template(chat_template_path)
    _add(tokenizer, add_tokens)
    return tokenizer


def tokenizer_of(base: Path, adapter: Path | None, data: DataConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: the base's with the new tokens, or that of the adapter it has.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter that the run continues or evaluates, if any.
        data: the config's section.

    Raises:
        UserError: as in `load_tokenizer`, or the adapter does not know a token that is to be added.
    """
    if adapter is None:
        return load_tokenizer(base, data.chat_template_path, data.new_tokens)
    tokenizer = load_tokenizer(tokenizer_folder(base, adapter), data.chat_template_path)
    known = tokenizer.get_vocab()
    lacking = [token.content for token in data.new_tokens if token.content not in known]
    if lacking:
        raise UserError(
            f"data.add_tokens: the tokenizer of the adapter {adapter} does not have "
            f"{', '.join(map(repr, lacking))}; only a new adapter can get new tokens"
        )
    return tokenizer


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """Where the tokenizer is: with the adapter, which may have tokens of its own, or the base."""
    if adapter is not None and (adapter / "tokenizer.json").is_file():
        return adapter
    return base


def _add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[NewToken]) -> None:
    known = tokenizer.get_vocab()
    if old := [token.content for token in tokens if token.content in known]:
        ids = [known[content] for content in old]
        raise UserError(
            f"data.add_tokens: {', '.join(map(repr, old))} is in the vocabulary already; "
            f"peft.trainable_token_indices: {ids} trains its row"
        )
    for token in tokens:
        # Found in the text as it is, not in what the tokenizer's normalizer makes of it.
        added = transformers.AddedToken(token.content, special=token.special, normalized=False)
        tokenizer.add_tokens(added, special_tokens=token.special)


def new_token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[NewToken]) -> list[int]:
    """The ids of tokens that were added."""
    known = tokenizer.get_vocab()
    return [known[token.content] for token in tokens]


def _read_template(path: str) -> str:
    local = Path(path).expanduser()
    try:
        if local.is_file():
            return local.read_text(encoding="utf-8")
        other = transformers.AutoTokenizer.from_pretrained(local if local.is_dir() else path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"data.chat_template_path {path}: neither a Jinja file nor a tokenizer ({first_line})"
        ) from None
    if not isinstance(other.chat_template, str):
        raise UserError(f"data.chat_template_path {path}: this tokenizer has no chat template")
    return other.chat_template


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides how texts and chats become tokens."""
    backend = tokenizer.backend_tokenizer
    # State that every call sets.
    backend.no_truncation()
    backend.no_padding()
    parts = {
        "tokenizer": backend.to_str(),
        "chat_template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "versions": [transformers.__version__, tokenizers.__version__, jinja2.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
