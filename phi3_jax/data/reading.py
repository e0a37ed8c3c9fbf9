"""Find the rows of a split: in a file, a folder as people have them, or on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets

from phi3_jax.data.files import FORMATS, Source, format_of, read_file, rows_of_table
from phi3_jax.errors import UserError

# What `datasets` and the hub put beside the data.
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


def read_rows(path: str, name: str | None, split: str) -> list[Source]:
    """All rows of one split of a file, folder or hub dataset, with their locations.

    Raises:
        UserError: not found, no such split, or a file that cannot be read.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return _from_disk(local, split)
        files, split = _files_of_split(local, name, split)
    elif local.is_file():
        files = [local]
    elif path.count("/") > 1 or path.startswith((".", "~")) or format_of(local):
        raise UserError(f"{path}: no such file or folder")
    else:
        return _from_hub(path, name, split)
    rows = [row for file in files for row in read_file(file)]
    return _slice(rows, split, path)


def _files_of_split(folder: Path, name: str | None, split: str) -> tuple[list[Path], str]:
    """Files named after the split (`test_sft.jsonl`, `train-00000-of-00002.parquet`).

    They are in the folder, or in the places that data sets on the hub have for them: `data/`, a
    folder named after the split, or one named after the subset. If no file is named after a split,
    all of them are `train`. The returned split is expressed as `train`, with the slice kept.
    """
    wanted, bracket, part = split.partition("[")
    rest = "train" + bracket + part
    places = [folder / name, folder / name / "data"] if name else []
    places += [folder, folder / "data"]
    files = next(filter(None, map(_data_files, places)), [])
    chosen = [file for file in files if _is_named(file, wanted)]
    if not chosen:
        chosen = [file for place in places for file in _data_files(place / wanted)]
    if chosen:
        return chosen, rest
    if not files:
        raise UserError(f"{folder}: no {', '.join(FORMATS)} files in it")
    if wanted != "train":
        raise UserError(f"{folder}: no file of split {wanted!r}; found {[f.name for f in files]}")
    return files, rest


def _data_files(folder: Path) -> list[Path]:
    """The files with rows in a folder itself, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and format_of(file)
        and file.name not in METADATA
        and not file.name.startswith(".")
    )


def _is_named(file: Path, split: str) -> bool:
    """Whether a file is named after a split: `train.jsonl.gz`, `train-00000-of-00002.parquet`."""
    stem = file.name[: file.name.lower().rindex(str(format_of(file)))]
    return stem == split or stem.startswith(f"{split}-")


def _slice(rows: list[Source], split: str, path: str) -> list[Source]:
    """Apply a `train[...]` slice, in `datasets` notation."""
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path}: split {split!r}: a file has the split train ({error})") from None
    return [row for part in parts for row in rows[part.from_ or 0 : part.to]]


def _from_disk(folder: Path, split: str) -> list[Source]:
    """A folder that `save_to_disk` wrote: a Dataset, which is the split train, or a DatasetDict."""
    wanted, bracket, part = split.partition("[")
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{folder}: not a readable save_to_disk folder ({error})") from None
    if isinstance(saved, datasets.DatasetDict):
        if wanted not in saved:
            raise UserError(f"{folder}: no split {wanted!r}; it has {sorted(saved)}")
        saved = saved[wanted]
        split = "train" + bracket + part
    return _slice(list(rows_of_table(saved, str(folder))), split, str(folder))


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
            f"{path}: no such file or folder, and not available on the hub ({first_line})"
        ) from None
    rows: Iterator[Source] = rows_of_table(table, f"{path} {split}")
    return list(rows)
