"""The metadata and text of a model card: README.md with Hugging Face's front matter."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from phi3_jax.checkpoint.hub import find_file, is_repo_id

# The picture of the loss beside an adapter's card.
PICTURE = "loss.png"


def card_data(
    base: str, relation: str, library: str, tags: list[str], **fields: Any
) -> ModelCardData:
    """Front matter of a model card.

    Args:
        base: name of the base model. The hub refuses a card whose base is not a model there, so a
            local folder is left out.
        relation: `adapter`, `finetune` or `quantized`.
        library: what loads it, such as `peft`.
        tags: further tags.
        fields: others of `ModelCardData`.
    """
    if is_repo_id(base):
        fields["base_model"] = base
        tags = [*tags, f"base_model:{relation}:{base}"]
    return ModelCardData(library_name=library, pipeline_tag="text-generation", tags=tags, **fields)


def card_text(data: ModelCardData, body: str) -> str:
    """The text of a card, which the hub's own parser has read."""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def terms_of(base: str, revision: str | None = None) -> dict[str, Any]:
    """License and language in the base model's own card, under their names in `ModelCardData`.

    Empty where the base has no card that can be read here.
    """
    with contextlib.suppress(ValueError, OSError):  # not a card, or a bucket does not answer
        if (file := find_file(base, "README.md", revision)) is None:
            return {}
        data = ModelCard.load(Path(file)).data
        names = ("license", "license_name", "license_link", "language")
        return {name: value for name in names if (value := data.get(name)) is not None}
    return {}
