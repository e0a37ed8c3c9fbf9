"""Read raw rows from files, folders or the hub, each with its location.

JSON and JSONL files are read line by line so that errors can cite the line; Parquet, CSV and hub
datasets are read with `datasets`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from phi3_jax.errors import UserError

TABLE_READERS = {".parquet": "parquet", ".csv": "csv"}
SUFFIXES = (".json", ".jsonl", *TABLE_READERS)


@dataclasses.dataclass(frozen=True)
class Source:
    """One raw row and its location; `problem` is set if it could not be read."""

    where: str
    row: Any
    problem: str | None = None


def read_rows(path: str, name: str | None, split: str) -> list[Source]:
    """All rows of one split of a file, folder or hub dataset, with their locations."""
    local = Path(path).expanduser()
    if local.is_dir():
        files, split = _files_of_split(local, split)
    elif local.is_file():
        files = [local]
    elif path.count("/") > 1 or path.startswith((".", "~")) or local.suffix in SUFFIXES:
        raise UserError(f"{path}: no such file or folder")
    else:
        return _from_hub(path, name, split)
    readers: dict[bool, Callable[[Path], Iterator[Source]]] = {True: _read_json, False: _read_table}
    rows = [row for file in files for row in readers[file.suffix in (".json", ".jsonl")](file)]
    return _slice(rows, split, path)


def _files_of_split(folder: Path, split: str) -> tuple[list[Path], str]:
    """Files named after the split (`test_sft.jsonl`, `train-00000-of-00002.parquet`).

    If no file is named after a split, all of them are `train`. The returned split is expressed as
    `train`, with the slice kept.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise UserError(f"{folder}: no {', '.join(SUFFIXES)} file there")
    name, bracket, part = split.partition("[")
    chosen = [file for file in files if file.stem == name or file.stem.startswith(f"{name}-")]
    if not chosen and name != "train":
        raise UserError(f"{folder}: no file of split {name!r}; there is {[f.name for f in files]}")
    return chosen or files, "train" + bracket + part


def _slice(rows: list[Source], split: str, path: str) -> list[Source]:
    """Apply a `train[...]` slice, in `datasets` notation."""
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path}: split {split!r}: a file has the split train ({error})") from None
    return [row for part in parts for row in rows[part.from_ or 0 : part.to]]


def _read_json(file: Path) -> Iterator[Source]:
    """JSON objects, one per line; or, in a .json file, one list of objects."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error})") from None
    if file.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from None
        yield from (Source(f"{file}: row {i}", row) for i, row in enumerate(rows, start=1))
        return
    # Not str.splitlines: it would also split at U+2028 inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            yield Source(where, json.loads(line))
        except json.JSONDecodeError as error:
            yield Source(where, None, f"not valid JSON ({error.msg} at column {error.colno})")


def _read_table(file: Path) -> Iterator[Source]:
    if file.suffix not in TABLE_READERS:
        raise UserError(f"{file}: one of {', '.join(SUFFIXES)} is expected")
    features = None
    if file.suffix == ".csv":
        # Keep everything as text: an answer "42" is a string.
        with file.open(newline="", encoding="utf-8") as lines:
            columns = next(csv.reader(lines), [])
        features = datasets.Features({column: datasets.Value("string") for column in columns})
    try:
        table = datasets.load_dataset(
            TABLE_READERS[file.suffix], data_files=str(file), split="train", features=features
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{file}: cannot be read ({cause})") from None
    for number, row in enumerate(table, start=1):
        yield Source(f"{file}: row {number}", row)


def _from_hub(path: str, name: str | None, split: str) -> list[Source]:
    try:
        table = datasets.load_dataset(path, name, split=split)
    except (
        datasets.exceptions.DatasetNotFoundError,
        datasets.exceptions.DatasetGenerationError,
        ValueError,
        RuntimeError,
        OSError,
    ) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path}: no such file or folder, and not to be had from the hub ({first_line})"
        ) from None
    return [Source(f"{path} {split}: row {i}", row) for i, row in enumerate(table, start=1)]
