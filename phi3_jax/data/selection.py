"""Which rows of which files are trained on, and which are held out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import datasets
import numpy as np

from phi3_jax.config.data import DataConfig, SourceConfig
from phi3_jax.data.cache import CountedFile, TokenCache, Wanted, chosen
from phi3_jax.data.files import DataFile
from phi3_jax.data.reading import Found, find_files, held_out_split
from phi3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows of a data set.

    Attributes:
        source: the data set.
        files: its files, whose rows are numbered one after the other.
        numbers: int64, the rows, in the order of the examples; overlapping slices repeat some.
    """

    source: SourceConfig
    files: list[CountedFile]
    numbers: np.ndarray

    def limited(self, count: int | None) -> Selection:
        """The first rows."""
        return dataclasses.replace(self, numbers=self.numbers[:count])

    def wanted(self) -> list[Wanted]:
        """The same rows, each once, as rows of each file; files without any are left out."""
        return [one for one in chosen(self.files, np.unique(self.numbers)) if len(one.numbers)]


def select(config: DataConfig, cache: TokenCache) -> tuple[list[Selection], list[Selection]]:
    """The rows of each data set to train on, and those that are held out, if any.

    Raises:
        UserError: data not found, or rows that are both trained on and held out.
    """
    known: dict[Path, CountedFile] = {}

    def count(file: DataFile) -> CountedFile:
        if file.path not in known:
            known[file.path] = cache.count(file)
        return known[file.path]

    train, test = [], []
    sources = config.data_sets
    if config.test_path is not None:
        own = held_out_source(config)
        held = _find(own, held_out_split(config.test_path), cache)
        test.append(all_rows(own, held, [count(file) for file in held.files]))
    digests = {counted.digest for part in test for counted in part.files if counted.rows}
    for source in sources:
        found = _find(source, source.split, cache)
        files = [count(file) for file in found.files]
        kept = [counted for counted in files if counted.digest not in digests]
        if not kept:
            raise UserError(
                f"data.path {source.path} has no file that data.test_path {config.test_path} does "
                "not hold out; to hold out a part of a file, use data.test_size or data.test_split"
            )
        rows = all_rows(source, found, kept)
        if config.test_split is not None:
            held = _find(source, config.test_split, cache)
            test.append(all_rows(source, held, [count(file) for file in held.files]))
        if config.test_size is not None:
            rows, own_test = _hold_out(rows, config.test_size, config.split_seed)
            test.append(own_test)
        train.append(rows)
    return train, test


def refuse_overlap(train: list[Selection], test: list[Selection], config: DataConfig) -> None:
    """Raise UserError if a row is in both, as with the splits `train` and `train[:5%]`."""
    advice = (
        "give data.split and data.test_split slices that do not overlap, such as train[5%:] and "
        "train[:5%]"
    )
    if config.test_size is not None:
        advice = (
            "with data.test_size, a row may be in only one of data.sources and one slice of its "
            "split; or hold out a file by data.test_path"
        )
    held: dict[str, list[np.ndarray]] = {}
    for one in (one for part in test for one in part.wanted()):
        held.setdefault(one.counted.file.label, []).append(one.numbers)
    for part in train:
        for one in part.wanted():
            own = [np.intersect1d(one.numbers, n) for n in held.get(one.counted.file.label, [])]
            if count := sum(map(len, own)):
                raise UserError(
                    f"{one.counted.file.label}: {count:,} rows are both trained on and held out "
                    f"(of the split {part.source.split!r}); {advice}"
                )


def held_out_source(config: DataConfig) -> SourceConfig:
    """`data.test_path` as a source: of one data set, it has the same format and columns."""
    sources, path = config.data_sets, str(config.test_path)
    own = sources[0] if len(sources) == 1 else SourceConfig(path=path)
    return own.model_copy(update={"path": path, "name": None, "revision": None})


def _find(source: SourceConfig, split: str, cache: TokenCache) -> Found:
    return find_files(source.path, source.name, split, source.revision, cache.scratch)


def all_rows(source: SourceConfig, found: Found, files: list[CountedFile]) -> Selection:
    """All rows of a source that its split takes."""
    return Selection(source, files, found.numbers(sum(counted.rows for counted in files)))


def _hold_out(rows: Selection, test_size: float | int, seed: int) -> tuple[Selection, Selection]:
    """Split like `datasets.Dataset.train_test_split`, so known recipes hold out the same rows."""
    total = len(rows.numbers)
    numbers = datasets.Dataset.from_dict({"row": np.arange(total)})
    try:
        parts = numbers.train_test_split(test_size=test_size, seed=seed)
    except ValueError as error:
        raise UserError(f"data.test_size {test_size} of {total} rows: {error}") from None
    train, test = (np.asarray(parts[name]["row"], np.int64) for name in ("train", "test"))
    return (
        dataclasses.replace(rows, numbers=rows.numbers[train]),
        dataclasses.replace(rows, numbers=rows.numbers[test]),
    )


def first_rows(parts: list[Selection], count: int | None) -> list[Selection]:
    """The first rows of all parts together."""
    found = []
    for part in parts:
        part = part.limited(count)
        count = None if count is None else count - len(part.numbers)
        found.append(part)
    return found
