"""Upload a finished adapter or model folder to the Hugging Face hub, with its model card."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from phi3_jax.checkpoint.cards import PICTURE
from phi3_jax.checkpoint.mistaken import hint
from phi3_jax.errors import UserError

# What a folder for PEFT, transformers or llama.cpp holds.
PATTERNS = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.md",
    PICTURE,
    "*.gguf",
    "tokenizer.model",
    "merges.txt",
]
# How long the hub may be silent; its client would wait forever.
SILENCE_SECONDS = 120.0
# How long the client for large files repeats a call that fails. By default it is six minutes for
# each of several calls.
_RETRIES = ("HF_XET_CLIENT_RETRY_MAX_DURATION", "60s")


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    message: str | None = None,
    progress: bool = False,
) -> str:
    """Create the repository if it does not exist, and upload the folder as one commit.

    Args:
        folder: a PEFT adapter or a model, with its card and tokenizer.
        repo_id: `NAME` or `USER/NAME` on the hub that `HF_ENDPOINT` names, huggingface.co by
            default.
        private: make a new repository private; None leaves that to the account's default.
        message: the commit's message.
        progress: let the hub's client draw its progress and log what it tries again.

    Returns:
        The commit's address.

    Raises:
        UserError: neither an adapter nor a model, offline mode, no valid token, or a hub that
            refuses or does not answer.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(hint(folder) or f"{folder}: no such folder")
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        instead = hint(folder) or "`phi3-jax export` makes one from a run"
        raise UserError(
            f"{folder}: neither an adapter (adapter_config.json) nor a model (config.json); "
            f"{instead}"
        )
    os.environ.setdefault(*_RETRIES)  # read when the first file is sent
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise UserError(f"{repo_id}: cannot push while HF_HUB_OFFLINE is set")
    if huggingface_hub.get_token() is None:
        raise UserError(f"{repo_id}: no token for the hub: run `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi()
    huggingface_hub.get_session().timeout = SILENCE_SECONDS
    try:
        with contextlib.nullcontext() if progress else _silent_client():
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=folder,
                allow_patterns=PATTERNS,
                commit_message=message or f"Upload {folder.name} with phi3-jax",
            )
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        raise UserError(f"{repo_id}: the push to the hub failed ({_reasons(error)})") from None
    return str(commit.commit_url)


@contextlib.contextmanager
def _silent_client() -> Iterator[None]:
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    bars, level = not are_progress_bars_disabled(), get_verbosity()
    if bars:
        disable_progress_bars()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(level)
        if bars:
            enable_progress_bars()


def _reasons(error: BaseException) -> str:
    """An exception's first line, and that of what caused it."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    said = f"{type(error).__name__}: {first_line}"
    return said if error.__cause__ is None else f"{said} {_reasons(error.__cause__)}"
