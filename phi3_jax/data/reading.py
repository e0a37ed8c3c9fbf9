"""Find the rows of a split: in a file, a folder as people have them, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import datasets

from phi3_jax.data.files import FORMATS, format_of, read_file, rows_of_table
from phi3_jax.data.rows import Source
from phi3_jax.errors import UserError

HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
# The words by which `datasets` finds a split in a file's name, set off by these characters.
_WORD = r"(?:^|[-._ 0-9])(?:{})(?:[-._ 0-9]|$)"
_TRAIN = re.compile(_WORD.format("train|training"), re.IGNORECASE)
_HELD_OUT = re.compile(
    _WORD.format("test|testing|validation|valid|val|dev|eval|evaluation|held[-_ ]?out|holdout"),
    re.IGNORECASE,
)
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


def held_out_split(path: str) -> str:
    """The split of `data.test_path`: `test`, `validation` or the like if it has one, else `train`.

    A folder that has neither, nor a file of `train`, is held out as a whole.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return "train"
    named = [*_data_files(folder), *_data_files(folder / "data")]
    for split in HELD_OUT_SPLITS:
        places = (folder / split, folder / "data" / split)
        if any(_is_named(file, split) for file in named) or any(map(_is_data, places)):
            return split
    return "train"


def _is_data(folder: Path) -> bool:
    return bool(_data_files(folder)) or (folder / "state.json").is_file()


def _files_of_split(folder: Path, name: str | None, split: str) -> tuple[list[Path], str]:
    """Files named after the split (`test_sft.jsonl`, `train-00000-of-00002.parquet`).

    They are in the folder, or in the places that data sets on the hub have for them: `data/`, a
    folder named after the split, or one named after the subset. If no file is named after a split,
    those not named as held out (`test.jsonl`, `my_eval.csv`) are `train`. The returned split is
    expressed as `train`, with the slice kept.
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
    chosen = [file for file in files if not is_held_out(file)]
    if not chosen:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{folder}: no file to train on; by their names these are held out: {names} (to train "
            f"on them, name a file in data.path or a split: data.split: {_stem(files[0])})"
        )
    return chosen, rest


def is_held_out(file: Path) -> bool:
    """Whether a file's name says that it is for testing: `test.jsonl`, `my_eval-0001.csv`."""
    stem = _stem(file)
    return bool(_HELD_OUT.search(stem)) and not _TRAIN.search(stem)


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
    stem = _stem(file)
    return stem == split or stem.startswith(f"{split}-")


def _stem(file: Path) -> str:
    """A file's name without the format and the compression."""
    return file.name[: file.name.lower().rindex(str(format_of(file)))]


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
