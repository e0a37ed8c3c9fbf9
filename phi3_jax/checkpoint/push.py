"""Upload a finished adapter or model folder to the Hugging Face hub, with its model card."""

from __future__ import annotations

from pathlib import Path

from phi3_jax.checkpoint.cards import PICTURE
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


def push_folder(
    folder: str | Path, repo_id: str, private: bool | None = None, message: str | None = None
) -> str:
    """Create the repository if it does not exist, and upload the folder as one commit.

    Args:
        folder: a PEFT adapter or a model, with its card and tokenizer.
        repo_id: `NAME` or `USER/NAME` on the hub that `HF_ENDPOINT` names, huggingface.co by
            default.
        private: make a new repository private; None leaves that to the account's default.
        message: the commit's message.

    Returns:
        The commit's address.

    Raises:
        UserError: neither an adapter nor a model, offline mode, no valid token, or a hub that
            refuses or does not answer.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise UserError(
            f"{folder}: neither an adapter (adapter_config.json) nor a model (config.json); "
            "`phi3-jax export` makes one from a run"
        )
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise UserError(f"{repo_id}: cannot push while HF_HUB_OFFLINE is set")
    if huggingface_hub.get_token() is None:
        raise UserError(f"{repo_id}: no token for the hub: run `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi()
    huggingface_hub.get_session().timeout = SILENCE_SECONDS
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=PATTERNS,
            commit_message=message or f"Upload {folder.name} with phi3-jax",
        )
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{repo_id}: the hub did not take it ({type(error).__name__}: {first_line})"
        ) from None
    return str(commit.commit_url)
