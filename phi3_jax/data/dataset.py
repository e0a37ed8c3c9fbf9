"""The training and held-out examples of a config: files, rows, tokens, and what was left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from phi3_jax.config.data import DataConfig, SourceConfig
from phi3_jax.data.cache import CountedFile, TokenCache, Wanted, chosen, open_cache
from phi3_jax.data.chunks import cores
from phi3_jax.data.encoder import EncoderSettings
from phi3_jax.data.examples import CachedExamples, cut, split_long
from phi3_jax.data.files import DataFile
from phi3_jax.data.mixing import Mixture
from phi3_jax.data.progress import TokenizingBar
from phi3_jax.data.reading import Found, find_files, held_out_split
from phi3_jax.data.report import DataReport
from phi3_jax.data.token_rows import TokenRows
from phi3_jax.errors import UserError
from phi3_jax.platform import user_cache

# Starting worker processes takes about as long as tokenizing this many bytes.
WORTH_WORKERS = 2**23


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split, and statistics on its rows.

    Attributes:
        examples: the examples.
        report: statistics on the rows.
        bad_rows: int64, rows of `examples.source` that were skipped.
    """

    examples: CachedExamples
    report: DataReport
    bad_rows: np.ndarray

    def fingerprint(self) -> str:
        """A digest of the examples, in order."""
        return self.examples.fingerprint()


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows of a data set.

    Attributes:
        source: the data set.
        files: its files, whose rows are numbered one after the other.
        numbers: int64, the rows, in the order of the examples.
    """

    source: SourceConfig
    files: list[CountedFile]
    numbers: np.ndarray

    def limited(self, count: int | None) -> Selection:
        """The first rows."""
        return dataclasses.replace(self, numbers=self.numbers[:count])

    def wanted(self) -> list[Wanted]:
        """The same rows as rows of each file, those files left out that have none."""
        return [one for one in chosen(self.files, np.sort(self.numbers)) if len(one.numbers)]


def load_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Split, Split | None]:
    """Load training examples and, if configured, held-out ones.

    Raises:
        UserError: data not found, a malformed row (with file and line), or no examples at all.
    """
    root = user_cache() / "tokenized"
    if config.cache_dir is not None:
        root = Path(config.cache_dir).expanduser()
    with open_cache(root) as cache:
        train, test = _select(config, cache)
        train = [part.limited(part.source.max_samples) for part in train]
        test = _first(test, config.max_test_samples)
        rows = _tokenize([*train, *test], config, tokenizer, cache)
        split = _split(train, _together(rows[: len(train)]), config, "train")
        if not test:
            return split, None
        return split, _split(test, _together(rows[len(train) :]), config, "held-out")


def _first(parts: list[Selection], count: int | None) -> list[Selection]:
    """The first rows of all parts together."""
    found = []
    for part in parts:
        part = part.limited(count)
        count = None if count is None else count - len(part.numbers)
        found.append(part)
    return found


def _select(config: DataConfig, cache: TokenCache) -> tuple[list[Selection], list[Selection]]:
    """The rows of each data set to train on, and those that are held out, if any."""
    known: dict[Path, CountedFile] = {}

    def count(file: DataFile) -> CountedFile:
        if file.path not in known:
            known[file.path] = cache.count(file)
        return known[file.path]

    train, test = [], []
    sources = config.data_sets
    if config.test_path is not None:
        held = find_files(
            config.test_path, None, held_out_split(config.test_path), scratch=cache.scratch
        )
        # Of one data set, it has the same columns; of several, they are recognized.
        update: dict[str, object] = {"path": config.test_path}
        own = sources[0] if len(sources) == 1 else SourceConfig(path=config.test_path)
        test.append(
            _all_rows(own.model_copy(update=update), held, [count(file) for file in held.files])
        )
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
        rows = _all_rows(source, found, kept)
        if config.test_split is not None:
            held = _find(source, config.test_split, cache)
            test.append(_all_rows(source, held, [count(file) for file in held.files]))
        if config.test_size is not None:
            rows, own_test = _hold_out(rows, config.test_size, config.split_seed)
            test.append(own_test)
        train.append(rows)
    return train, test


def _find(source: SourceConfig, split: str, cache: TokenCache) -> Found:
    return find_files(source.path, source.name, split, source.revision, cache.scratch)


def _all_rows(source: SourceConfig, found: Found, files: list[CountedFile]) -> Selection:
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


def _tokenize(
    parts: Sequence[Selection],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    cache: TokenCache,
) -> list[list[tuple[Path, str]]]:
    """The cache entries of each part's rows, in the order of its files, with the files' names."""
    found: list[list[tuple[Path, str]]] = [[] for _ in parts]
    settings = [_settings(part.source, config) for part in parts]
    with TokenizingBar() as bar:

        def watch(done: int, total: int, batch: pa.RecordBatch, file: DataFile) -> None:
            bar.update(done, total)
            if config.on_bad_row == "error" and batch["kind"].null_count < batch.num_rows:
                index = batch["kind"].is_valid().index(True).as_py()
                where = file.label + batch["place"][index].as_py()
                raise _bad_row(where, batch["problem"][index].as_py())

        left = list(range(len(parts)))
        while left:
            # Parts with the same settings go to the same workers.
            same = [i for i in left if settings[i] == settings[left[0]]]
            left = [i for i in left if i not in same]
            wanted = [(i, one) for i in same for one in parts[i].wanted()]
            paths = cache.entries(
                [one for _, one in wanted], tokenizer, settings[same[0]], _workers(config), watch
            )
            for (i, one), path in zip(wanted, paths, strict=True):
                found[i].append((path, one.counted.file.label))
    return found


def _settings(source: SourceConfig, config: DataConfig) -> EncoderSettings:
    # `dataset_text_field` is TRL's key for one of the columns.
    renamed = {"text": config.dataset_text_field} if config.dataset_text_field != "text" else {}
    columns = renamed | {str(ours): theirs for ours, theirs in (source.columns or {}).items()}
    return EncoderSettings(
        format=source.format,
        columns=columns or None,
        assistant_only_loss=config.assistant_only_loss,
        train_on=config.train_on,
        assistant_first=config.assistant_first,
    )


def _together(parts: Sequence[Sequence[tuple[Path, str]]]) -> TokenRows:
    flat = [entry for part in parts for entry in part]
    return TokenRows([path for path, _ in flat], [label for _, label in flat])


def _workers(config: DataConfig) -> Callable[[int, int], int]:
    """The number of worker processes for a number of chunks and their size in bytes."""

    def count(chunks: int, size: int) -> int:
        if config.dataset_num_proc is not None:
            return min(config.dataset_num_proc, chunks)
        return min(cores(), chunks) if size >= WORTH_WORKERS else 1

    return count


def _bad_row(where: str, problem: str) -> UserError:
    return UserError(f"{where}: {problem} (data.on_bad_row: skip skips such rows)")


def _split(parts: list[Selection], source: TokenRows, config: DataConfig, split: str) -> Split:
    """The examples of some rows, truncated or split, and what became of the rows."""
    ends = np.cumsum([0, *(len(part.numbers) for part in parts)])
    rows = np.concatenate(
        [
            first + np.searchsorted(np.sort(part.numbers), part.numbers)
            for first, part in zip(ends, parts, strict=False)
        ]
    )
    bad = rows[source.bad[rows]]
    report = DataReport(rows=len(rows))
    for row in bad.tolist():
        kind, problem = source.problem(row)
        if config.on_bad_row == "error":
            raise _bad_row(source.where(row), problem)
        report.skip(kind, source.where(row))
    good = rows[~source.bad[rows]]
    lengths = source.lengths[good]
    long = int((lengths > config.max_length).sum())
    packing = config.packing if split == "train" else config.packs_held_out
    strategy = config.packing_strategy if packing else None
    if strategy == "wrapped":
        examples = cut(source, good, int(lengths.max(initial=1)), "keep_start")
    elif strategy == "bfd_split":
        examples = split_long(source, good, config.max_length)
        report.split = long
    else:
        examples = cut(source, good, config.max_length, config.truncation_mode)
        learned = examples.target_counts > 0
        report.dropped = int((~learned).sum())
        report.cut = long - report.dropped
    examples = examples.select(examples.target_counts > 0)
    report.examples = len(examples)
    report.tokens = int(examples.lengths.sum())
    report.target_tokens = int(examples.target_counts.sum())
    report.note(source, good)
    names = [part.source.path for part in parts]
    if not len(examples):
        raise UserError(f"no {split} examples left in {', '.join(names)}: {report}")
    if split == "train" and len(parts) > 1:
        own = np.searchsorted(ends[1:], examples.rows, side="right")
        mixture = _mixture(parts, np.bincount(own, minlength=len(parts)).tolist(), config)
        examples = dataclasses.replace(examples, mixture=mixture)
        taken = zip(mixture.sizes, mixture.counts, strict=True)
        report.sources = dict(zip(mixture.names, taken, strict=True))
    return Split(examples, report, bad)


def _mixture(parts: list[Selection], sizes: list[int], config: DataConfig) -> Mixture:
    names = [part.source.path for part in parts]
    empty = [name for name, size in zip(names, sizes, strict=True) if not size]
    if empty:
        raise UserError(f"data.sources: no examples left in {', '.join(empty)}")
    short = [PurePosixPath(name).name or name for name in names]
    twice = {name for name in short if short.count(name) > 1}
    mixture = Mixture(
        names=tuple(
            f"{name} ({number})" if name in twice else name
            for number, name in enumerate(short, start=1)
        ),
        sizes=tuple(sizes),
        weights=tuple(part.source.weight for part in parts),
        stopping_strategy=config.stopping_strategy,
    )
    if not sum(mixture.counts):
        raise UserError("data.sources: an epoch of these weights has no example")
    return mixture
