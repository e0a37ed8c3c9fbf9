"""The `data` section of a run's config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from phi3_jax.config.sections import Section

Format = Literal[
    "auto", "messages", "conversations", "prompt_completion", "alpaca", "input_output", "text"
]

# The formats' column names, which `data.columns` maps to those in the file.
ColumnName = Literal[
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "segments",
    "text",
    "system",
    "history",
    "tools",
]


class DataConfig(Section):
    """Where the examples come from and which of their tokens are trained on."""

    path: str = Field(
        description="A JSON, JSONL, Parquet or CSV file (also `.gz`, `.bz2`, `.zst`), a folder of "
        "them, a folder that `save_to_disk` wrote, or a hub id."
    )
    name: str | None = Field(None, description="Configuration (subset) of a hub dataset.")
    split: str = Field(
        "train",
        description="Split to train on, in the notation of `datasets`: `train`, `train[:5%]`.",
    )
    test_path: str | None = Field(
        None, description="Take the held-out examples from this file, folder or hub id."
    )
    test_split: str | None = Field(
        None, description="Take the held-out examples from this split of `path`."
    )
    test_size: float | int | None = Field(
        None,
        gt=0,
        description="Hold out this fraction (0.05) or number (100) of the training rows.",
    )
    split_seed: int = Field(42, ge=0, description="Seed of the split that `test_size` makes.")
    format: Format = Field(
        "auto",
        description="Row format: `messages` (role, content), `conversations` (ShareGPT), "
        "`prompt_completion`, `alpaca` (instruction, input, output), `input_output` (Axolotl's "
        "segments) or `text`; `auto` detects it from the columns.",
    )
    columns: dict[ColumnName, str] | None = Field(
        None,
        description="Column names in the file, keyed by the format's own names: "
        "`{instruction: question, output: answer}`. Common names are recognized without it.",
    )
    assistant_only_loss: bool = Field(
        True,
        description="Compute the loss only on the assistant's turns, including their end-of-turn "
        "tokens (in `prompt_completion`, on the completion); false trains on every token.",
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="Which assistant turns of a chat to train on: all, or only the last."
    )
    assistant_first: Literal["learn", "refuse"] = Field(
        "learn",
        description="What to do with a chat that begins with the assistant: train on that turn "
        "too, or treat the row as malformed.",
    )
    max_length: int = Field(
        1024, ge=2, description="Maximum tokens per row; longer rows are truncated."
    )
    pad_to_multiple_of: int = Field(
        128,
        ge=1,
        description="Pad each batch to its longest row, rounded up to a multiple of this. Fewer "
        "distinct lengths mean fewer compilations.",
    )
    packing: bool = Field(
        False,
        description="Pack several examples into each row of `max_length` tokens, without attention "
        "between them; false puts each example in its own row.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="What to do with an unusable row: stop the run, or skip and count it.",
    )
    max_samples: int | None = Field(None, ge=1, description="Use only the first N training rows.")
    max_test_samples: int | None = Field(
        None, ge=1, description="Use only the first N held-out rows."
    )
