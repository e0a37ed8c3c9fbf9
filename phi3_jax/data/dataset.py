"""The training and held-out examples of a config: files, rows, tokens, and what was left out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from phi3_jax.config.data import DataConfig, PackingStrategy, SourceConfig
from phi3_jax.data.cache import TokenCache, open_cache
from phi3_jax.data.chunks import cores
from phi3_jax.data.encoder import EncoderSettings
from phi3_jax.data.examples import CachedExamples, cut, split_long
from phi3_jax.data.files import DataFile
from phi3_jax.data.mixing import Mixture, short_names
from phi3_jax.data.progress import TokenizingBar
from phi3_jax.data.report import DataReport
from phi3_jax.data.selection import Selection, first_rows, refuse_overlap, select
from phi3_jax.data.stream import Stream
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
        stream: where all rows come from, if these are only its first ones.
    """

    examples: CachedExamples
    report: DataReport
    bad_rows: np.ndarray
    stream: Stream | None = None

    def contents(self) -> np.ndarray:
        """int64, ascending, digests of the tokens of its rows."""
        source = self.examples.source
        return np.unique(source.contents[~source.bad])

    def fingerprint(self) -> str:
        """A digest of the examples, in order; of a stream, of its `identity`."""
        if self.stream is not None:
            return hashlib.sha256(self.stream.identity.encode()).hexdigest()
        return self.examples.fingerprint()


def load_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Split, Split | None]:
    """Load training examples and, if configured, held-out ones.

    Raises:
        UserError: data not found, a malformed row (with file and line), or no examples at all.
    """
    with open_cache(cache_root(config)) as cache:
        train, test = select(config, cache)
        train = [part.limited(part.source.max_samples) for part in train]
        test = first_rows(test, config.max_test_samples)
        refuse_overlap(train, test, config)
        rows = tokenize([*train, *test], config, tokenizer, cache)
        own = together(rows[: len(train)])
        if not test:
            return to_split(train, own, config, "train"), None
        held_out = to_split(test, together(rows[len(train) :]), config, "held-out")
        return to_split(train, own, config, "train", held_out.contents()), held_out


def load_held_out(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Split | None:
    """The held-out examples alone, if configured; arguments and errors as in `load_examples`."""
    with open_cache(cache_root(config)) as cache:
        _, test = select(config, cache)
        test = first_rows(test, config.max_test_samples)
        rows = tokenize(test, config, tokenizer, cache)
        return to_split(test, together(rows), config, "held-out") if test else None


def cache_root(config: DataConfig) -> Path:
    """The folder of the token cache."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return user_cache() / "tokenized"


def tokenize(
    parts: Sequence[Selection],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    cache: TokenCache,
) -> list[list[tuple[Path, str]]]:
    """The cache entries of each part's rows, in the order of its files, with the files' names."""
    found: list[list[tuple[Path, str]]] = [[] for _ in parts]
    settings = [encoder_settings(part.source, config) for part in parts]
    with TokenizingBar() as bar:

        def watch(done: int, total: int, batch: pa.RecordBatch, file: DataFile) -> None:
            bar.update(done, total)
            if config.on_bad_row == "error" and batch["kind"].null_count < batch.num_rows:
                index = batch["kind"].is_valid().index(True).as_py()
                where = file.label + batch["place"][index].as_py()
                raise bad_row(where, batch["problem"][index].as_py())

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


def encoder_settings(source: SourceConfig, config: DataConfig) -> EncoderSettings:
    """What decides the tokens of a source's rows."""
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


def together(parts: Sequence[Sequence[tuple[Path, str]]]) -> TokenRows:
    """The rows of cache entries, by what `tokenize` returns."""
    flat = [entry for part in parts for entry in part]
    return TokenRows([path for path, _ in flat], [label for _, label in flat])


def _workers(config: DataConfig) -> Callable[[int, int], int]:
    """The number of worker processes for a number of chunks and their size in bytes."""

    def count(chunks: int, size: int) -> int:
        if config.dataset_num_proc is not None:
            return min(config.dataset_num_proc, chunks)
        return min(cores(), chunks) if size >= WORTH_WORKERS else 1

    return count


def bad_row(where: str, problem: str) -> UserError:
    """The error of a row that stops the run."""
    return UserError(f"{where}: {problem} (data.on_bad_row: skip skips such rows)")


def to_split(
    parts: list[Selection],
    source: TokenRows,
    config: DataConfig,
    split: str,
    held_out: np.ndarray | None = None,
) -> Split:
    """The examples of some rows, truncated or split, and what became of the rows.

    Args:
        parts: the rows.
        source: the same, tokenized; a row that is in a part several times is here once.
        config: the config's section.
        split: what errors call them, `train` or `held-out`.
        held_out: int64, `contents` of held-out rows: training rows with the same tokens are left
            out. With `test_size`, which splits by row as `datasets` does, they are only counted.
    """
    found = [np.unique(part.numbers, return_inverse=True) for part in parts]
    ends = np.cumsum([0, *(len(once) for once, _ in found)])
    rows = np.concatenate([first + places for first, (_, places) in zip(ends, found, strict=False)])
    bad = rows[source.bad[rows]]
    report = DataReport(rows=len(rows))
    for row in bad.tolist():
        kind, problem = source.problem(row)
        if config.on_bad_row == "error":
            raise bad_row(source.where(row), problem)
        report.skip(kind, source.where(row))
    good = ~source.bad
    if held_out is not None:
        repeats = source.repeats(held_out)
        if config.test_size is None:
            good &= ~repeats
            report.held_out = int(repeats[rows].sum())
        else:
            report.repeated = int(repeats[rows].sum())
    packing = config.packing if split == "train" else config.packs_held_out
    strategy = config.packing_strategy if packing else None
    examples = make_examples(source, rows[good[rows]], config, strategy, report)
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


def make_examples(
    source: TokenRows,
    good: np.ndarray,
    config: DataConfig,
    strategy: PackingStrategy | None,
    report: DataReport,
) -> CachedExamples:
    """The examples of good rows, truncated or split, of which something is learned.

    Args:
        source: the tokenized rows.
        good: int64, which of them.
        config: the config's section.
        strategy: how rows are packed, if they are.
        report: gets what became of the rows.
    """
    lengths = source.lengths[good]
    long = int((lengths > config.max_length).sum())
    if strategy == "wrapped":
        examples = cut(source, good, int(lengths.max(initial=1)), "keep_start")
    elif strategy == "bfd_split":
        examples = split_long(source, good, config.max_length)
        report.split = long
    else:
        examples = cut(source, good, config.max_length, config.truncation_mode)
        learned = examples.target_counts > 0
        dropped = int((~learned).sum())
        report.dropped += dropped
        report.cut = long - dropped
    examples = examples.select(examples.target_counts > 0)
    report.examples = len(examples)
    report.tokens = int(examples.lengths.sum())
    report.target_tokens = int(examples.target_counts.sum())
    report.note(source, good)
    return examples


def _mixture(parts: list[Selection], sizes: list[int], config: DataConfig) -> Mixture:
    names = [part.source.path for part in parts]
    empty = [name for name, size in zip(names, sizes, strict=True) if not size]
    if empty:
        raise UserError(f"data.sources: no examples left in {', '.join(empty)}")
    mixture = Mixture(
        names=short_names(names),
        sizes=tuple(sizes),
        weights=tuple(part.source.weight for part in parts),
        stopping_strategy=config.stopping_strategy,
    )
    if not sum(mixture.counts):
        raise UserError("data.sources: an epoch of these weights has no example")
    return mixture
