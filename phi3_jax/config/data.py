"""The `data` section of a run's config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from phi3_jax.config.sections import Section

Format = Literal[
    "auto", "messages", "conversations", "prompt_completion", "alpaca", "input_output", "text"
]

PackingStrategy = Literal["bfd", "bfd_split", "wrapped"]

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


class SourceConfig(Section):
    """One of several data sets of a run."""

    path: str = Field(min_length=1, description="As `data.path`.")
    weight: float = Field(
        1.0, gt=0, description="Share of the examples, relative to that of the other sources."
    )
    name: str | None = Field(None, description="As `data.name`.")
    revision: str | None = Field(None, description="As `data.revision`.")
    split: str = Field("train", description="As `data.split`.")
    format: Format = Field("auto", description="As `data.format`.")
    columns: dict[ColumnName, str] | None = Field(None, description="As `data.columns`.")
    max_samples: int | None = Field(None, ge=1, description="Use only the first N rows.")


class NewToken(Section):
    """A token to add to the tokenizer."""

    content: str = Field(min_length=1, description="The token's text.")
    special: bool = Field(
        False, description="A special token, which decoding with `skip_special_tokens` leaves out."
    )


class DataConfig(Section):
    """Where the examples come from and which of their tokens are trained on."""

    sources: list[SourceConfig] = Field(
        [],
        description="Several data sets instead of one, each with its `path`, and maybe `weight` "
        "(share of the examples), `name`, `revision`, `split`, `format`, `columns` and "
        "`max_samples`.",
    )
    streaming: bool = Field(
        False,
        description="Read the training rows as they come, without a copy or a cache on disk, again "
        "and again until `training.max_steps`. `path` and `sources` may be larger than the disk.",
    )
    shuffle_buffer_size: int = Field(
        10_000,
        ge=1,
        description="Rows of a stream that are shuffled, and packed, together.",
    )
    path: str | None = Field(
        None,
        min_length=1,
        validate_default=True,
        description="A JSON, JSONL, Parquet, Arrow, CSV or TSV file (also `.gz`, `.bz2`, `.zst`, "
        "`.xz`), a folder of them, a folder that `save_to_disk` wrote, a URL of a file or folder "
        "(`gs://`, `s3://`, `hf://`, `https://`), or a hub id.",
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted",
        description="Which of the `sources` ends an epoch: the first that runs out, or the last, "
        "with the examples of the others repeated.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the hub id.")
    name: str | None = Field(
        None, description="Configuration (subset) of a data set that has several."
    )
    split: str = Field(
        "train",
        description="Split to train on, in the notation of `datasets`: `train`, `train[:5%]`.",
    )
    test_path: str | None = Field(
        None,
        min_length=1,
        description="Take the held-out examples from this file, folder or hub id.",
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
    dataset_text_field: str = Field(
        "text", description="Column of the texts; the same as `columns: {text: ...}`."
    )
    chat_template_path: str | None = Field(
        None,
        min_length=1,
        description="Chat template to use instead of the checkpoint's: a Jinja file, or a "
        "tokenizer's folder or hub id.",
    )
    add_tokens: list[str | NewToken] = Field(
        [],
        description="Tokens to add to the tokenizer: texts, or mappings with `content` and "
        "`special`. The embedding and the head grow if they have no rows left, and the new rows "
        "are trained and saved with the adapter.",
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
    truncation_mode: Literal["keep_start", "keep_end"] = Field(
        "keep_start", description="Which end of a row that is longer than max_length to keep."
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
    packing_strategy: PackingStrategy = Field(
        "bfd",
        description="How `packing` fills rows. `bfd` truncates examples to max_length and packs "
        "them best fit, longest first; `bfd_split` splits longer examples instead of truncating "
        "them; `wrapped` writes all examples one after the other and cuts that into full rows, "
        "whose tokens attend to each other.",
    )
    eval_packing: bool | None = Field(
        None, description="Pack held-out rows; null does as `packing` says."
    )
    dataset_num_proc: int | None = Field(
        None,
        ge=1,
        description="Number of processes that render and tokenize; null uses one per core for "
        "large data.",
    )
    cache_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder for tokenized data, which later runs and other hosts reuse; null is "
        "`~/.cache/phi3-jax/tokenized`.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="What to do with an unusable row: stop the run, or skip and count it.",
    )
    max_samples: int | None = Field(None, ge=1, description="Use only the first N training rows.")
    max_test_samples: int | None = Field(
        None, ge=1, description="Use only the first N held-out rows."
    )

    @field_validator("path")
    @classmethod
    def _one_place(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and not info.data.get("sources", True):
            raise PydanticCustomError("missing", "missing")
        return value

    @property
    def data_sets(self) -> list[SourceConfig]:
        """The `sources`, or `path` as the only one."""
        if self.path is None:
            return self.sources
        return [
            SourceConfig(
                path=self.path,
                name=self.name,
                revision=self.revision,
                split=self.split,
                format=self.format,
                columns=self.columns,
                max_samples=self.max_samples,
            )
        ]

    @property
    def new_tokens(self) -> list[NewToken]:
        """`add_tokens`, each with all its settings."""
        return [
            NewToken(content=token) if isinstance(token, str) else token
            for token in self.add_tokens
        ]

    @field_validator("add_tokens")
    @classmethod
    def _each_once(cls, value: list[str | NewToken]) -> list[str | NewToken]:
        texts = [token if isinstance(token, str) else token.content for token in value]
        if twice := sorted({text for text in texts if texts.count(text) > 1}):
            raise ValueError(f"{', '.join(map(repr, twice))} is listed twice")
        if not all(texts):
            raise ValueError("a token must not be empty")
        return value

    @property
    def packs_held_out(self) -> bool:
        """Whether held-out rows are packed."""
        return self.packing if self.eval_packing is None else self.eval_packing
