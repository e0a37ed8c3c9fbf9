"""The `data` section of a run's config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from phi3_jax.config.sections import Section

Format = Literal["auto", "messages", "conversations", "prompt_completion", "alpaca", "text"]

# Our names of the columns, which `data.columns` maps to the file's.
ColumnName = Literal[
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "system",
    "history",
    "tools",
]


class DataConfig(Section):
    """Where the examples come from and which of their tokens are learned."""

    path: str = Field(
        description="A JSON, JSONL, Parquet or CSV file (also `.gz`, `.bz2`, `.zst`), a folder of "
        "them, a folder that `save_to_disk` wrote, or a hub id."
    )
    name: str | None = Field(None, description="Subset (configuration) of a hub data set.")
    split: str = Field(
        "train", description="Split to train on, as `datasets` names it: `train`, `train[:5%]`."
    )
    test_path: str | None = Field(
        None, description="Held-out examples from a file, folder or hub id of their own."
    )
    test_split: str | None = Field(None, description="Held-out examples: a split of `path`.")
    test_size: float | int | None = Field(
        None,
        gt=0,
        description="Held-out examples: a share (0.05) or a number (100) of the training rows.",
    )
    split_seed: int = Field(42, ge=0, description="Seed of the `test_size` split.")
    format: Format = Field(
        "auto",
        description="What a row holds; `auto` goes by its columns: `messages` (role, content), "
        "`conversations` (ShareGPT), `prompt_completion`, `alpaca` (instruction, input, output) "
        "or `text`.",
    )
    columns: dict[ColumnName, str] | None = Field(
        None,
        description="The file's names of the columns, by the format's names: "
        "`{instruction: question, output: answer}`. Well-known ones are recognized without it.",
    )
    assistant_only_loss: bool = Field(
        True,
        description="Learn what the assistant says and its end-of-turn token (of prompt and "
        "completion: the completion); false learns every token.",
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="The assistant's turns to learn: all of a chat, or the last one."
    )
    assistant_first: Literal["learn", "refuse"] = Field(
        "learn",
        description="A chat that begins with the assistant: learn that turn too, or treat the row "
        "as malformed.",
    )
    max_length: int = Field(1024, ge=2, description="Tokens of a row; longer ones are cut.")
    pad_to_multiple_of: int = Field(
        128,
        ge=1,
        description="Batches are padded to their longest row, rounded up to this: fewer lengths "
        "mean fewer compilations.",
    )
    packing: bool = Field(
        False,
        description="Several examples in a row of `max_length`, each apart from the others; false "
        "gives each a row of its own.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="A row that cannot be used stops the run, or is skipped and counted."
    )
    max_samples: int | None = Field(None, ge=1, description="Use the first so many training rows.")
    max_test_samples: int | None = Field(
        None, ge=1, description="Use the first so many held-out rows."
    )
