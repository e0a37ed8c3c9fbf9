"""The token cache: the same bytes by any number of processes, rebuilt when something changed."""

from __future__ import annotations

import filecmp
import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.config.data import DataConfig
from phi3_jax.data import cache as cache_module
from phi3_jax.data import chunks, workers
from phi3_jax.data.dataset import load_examples
from phi3_jax.data.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.phi3_jax.conftest import TOKENIZER


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 3)


@pytest.fixture
def made(monkeypatch):
    """How many rows were tokenized, call by call."""
    counts = []
    encode = workers.Encoder.encode

    def counting(self, sources):
        counts.append(len(sources))
        return encode(self, sources)

    monkeypatch.setattr(workers.Encoder, "encode", counting)
    return counts


ROWS = [
    {"messages": [
        {"role": "user", "content": f"Question {i} " * (i % 4 + 1)},
        {"role": "assistant", "content": f"Answer {i}"},
    ]}
    for i in range(11)
]  # fmt: skip


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def load(tokenizer, tmp_path, **settings):
    return load_examples(DataConfig(cache_dir=str(tmp_path / "cache"), **settings), tokenizer)


def tokens(split):
    return [(e.tokens.tolist(), e.targets.tolist()) for e in split.examples]


def entries(folder):
    return sorted(folder.glob("??/*.arrow"))


def test_worker_processes_give_the_bytes_of_one_process(tmp_path, tokenizer, small_chunks):
    rows = [*ROWS[:4], "{broken", "", *ROWS[4:], {"text": "a" * 50}, {"question": 1}]
    path = write(tmp_path / "a.jsonl", rows)
    gzip.open(tmp_path / "b.json.gz", "wt").write(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "c.parquet"))
    tokenizer.chat_template = tokenizer.chat_template + ""  # as the object has it, not the folder
    found = {}
    for processes in (1, 3):
        found[processes], _ = load_examples(
            DataConfig(
                path=str(tmp_path), cache_dir=str(tmp_path / f"cache{processes}"),
                dataset_num_proc=processes, on_bad_row="skip",
            ),
            tokenizer,
        )  # fmt: skip
    assert tokens(found[1]) == tokens(found[3])
    assert str(found[1].report) == str(found[3].report)
    assert found[1].report.bad == {"unreadable": 1, "unknown columns": 1}
    assert found[1].report.first_bad["unreadable"] == f"{path}:5"
    assert len(found[1].examples) == 3 * len(ROWS) + 1
    one, three = (entries(tmp_path / f"cache{n}") for n in (1, 3))
    assert [file.name for file in one] == [file.name for file in three]
    assert all(filecmp.cmp(a, b, shallow=False) for a, b in zip(one, three, strict=True))
    assert not list(tmp_path.glob("cache*/tmp-*"))


def test_a_worker_starts_without_jax():
    """Which takes a second and 140 MB."""
    check = "import sys; print(sorted({'jax', 'flax', 'torch', 'datasets'} & sys.modules.keys()))"
    program = workers.START.replace("\nmain()", f"\n{check}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.stdout == "[]\n", run.stderr


def test_a_worker_reports_a_bad_row_and_its_own_death(
    tmp_path, tokenizer, small_chunks, monkeypatch
):
    path = write(tmp_path / "a.jsonl", [*ROWS, "{broken"])
    with pytest.raises(UserError, match=r"a.jsonl:12: not valid JSON"):
        load(tokenizer, tmp_path, path=path, dataset_num_proc=2)
    monkeypatch.setattr(workers, "START", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"died with code -9 \(out of memory\?\)"):
        load(tokenizer, tmp_path, path=path, dataset_num_proc=2, on_bad_row="skip")
    assert not entries(tmp_path / "cache")


def test_only_what_changed_is_tokenized_again(tmp_path, tokenizer, made):
    path = write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", ROWS[:2])
    first, _ = load(tokenizer, tmp_path, path=str(tmp_path))
    assert made == [11, 2]
    # What does not change a row's tokens: truncation, packing, the folder's and the file's name.
    load(
        tokenizer,
        tmp_path,
        path=str(tmp_path),
        packing=True,
        max_length=9,
        truncation_mode="keep_end",
    )
    os.rename(path, tmp_path / "z.jsonl")
    renamed, _ = load(tokenizer, tmp_path, path=str(tmp_path))
    assert made == [11, 2]
    assert sorted(tokens(renamed)) == sorted(tokens(first))
    # A file of the same size and time.
    times = os.stat(tmp_path / "b.jsonl")
    write(tmp_path / "b.jsonl", [ROWS[2], ROWS[1]])
    os.utime(tmp_path / "b.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    changed, _ = load(tokenizer, tmp_path, path=str(tmp_path / "b.jsonl"))
    assert made == [11, 2, 2]
    assert tokens(changed)[0] == tokens(first)[2]
    # What does: which tokens are learned, and the chat template.
    load(tokenizer, tmp_path, path=str(tmp_path / "b.jsonl"), train_on="last")
    template = tokenizer.chat_template
    tokenizer.chat_template = template + "{# another #}"
    load(tokenizer, tmp_path, path=str(tmp_path / "b.jsonl"))
    tokenizer.chat_template = template
    assert made == [11, 2, 2, 2, 2]


def test_of_several_processes_one_tokenizes_and_the_others_wait(tmp_path, tokenizer, made):
    path = write(tmp_path / "a.jsonl", ROWS)
    with ThreadPoolExecutor(3) as threads:
        splits = list(threads.map(lambda _: load(tokenizer, tmp_path, path=path)[0], range(3)))
    assert made == [11]
    assert tokens(splits[0]) == tokens(splits[1]) == tokens(splits[2])


def test_only_the_rows_in_use_are_tokenized(tmp_path, tokenizer, made, small_chunks):
    path = write(tmp_path / "a.jsonl", [*ROWS, "{broken"])
    train, test = load(tokenizer, tmp_path, path=path, split="train[4:9]", test_split="train[:2]")
    assert sum(made) == 7
    assert "Question 4" in tokenizer.decode(train.examples[0].tokens)
    assert "Question 1" in tokenizer.decode(test.examples[1].tokens)
    load(tokenizer, tmp_path, path=path, split="train[4:9]", max_samples=1)
    assert sum(made) == 8


@pytest.mark.parametrize(
    "split", ["train[:50%]+train[:50%]", "train[:3]+train[2:5]", "train[4:]+train"]
)
def test_overlapping_slices_give_the_rows_of_datasets(tmp_path, tokenizer, split):
    """Also over several files, and later runs find the right rows in the cache."""
    (tmp_path / "d").mkdir()
    texts = [f"row {i}" for i in range(6)]
    files = [
        write(tmp_path / "d" / f"{first}.jsonl", [{"text": text} for text in own])
        for first, own in ((0, texts[:3]), (3, texts[3:]))
    ]
    theirs = datasets.load_dataset(
        "json", data_files=files, split=split, cache_dir=str(tmp_path / "theirs")
    )
    for asked, expected in ((split, list(theirs["text"])), ("train", texts)):
        train, _ = load(tokenizer, tmp_path, path=str(tmp_path / "d"), split=asked)
        found = [tokenizer.decode(e.tokens, skip_special_tokens=True) for e in train.examples]
        assert found == expected and train.report.rows == len(expected)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".arrow.gz"])
def test_names_as_long_as_a_file_system_allows(tmp_path, tokenizer, ending):
    path = tmp_path / ("a." + "b" * (255 - 2 - len(ending)) + ending)
    table = datasets.Dataset.from_list([{"text": "row 1"}])
    if ending == ".arrow.gz":
        table.save_to_disk(str(tmp_path / "saved"))
        (arrow,) = (tmp_path / "saved").glob("*.arrow")
        path.write_bytes(gzip.compress(arrow.read_bytes()))
    else:
        getattr(table, {".jsonl": "to_json"}.get(ending, f"to_{ending[1:]}"))(str(path))
    train, _ = load(tokenizer, tmp_path, path=str(path))
    assert train.examples.where(0).startswith(f"{path}:")


def test_a_damaged_entry_is_named(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS)
    load(tokenizer, tmp_path, path=path)
    (entry,) = entries(tmp_path / "cache")
    entry.write_bytes(entry.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged .*; delete it"):
        load(tokenizer, tmp_path, path=path)


def test_a_flipped_bit_of_an_entry_is_named(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS)
    train, _ = load(tokenizer, tmp_path, path=path)
    ids = np.asarray(train.examples[2].tokens, np.int32).tobytes()
    (entry,) = entries(tmp_path / "cache")
    content = bytearray(entry.read_bytes())
    content[content.index(ids) + 4] ^= 1
    entry.write_bytes(content)
    train, _ = load(tokenizer, tmp_path, path=path)
    with pytest.raises(UserError, match="its row 2 does not have its digest.*; delete it"):
        train.examples[2]  # noqa: B018


def test_unused_entries_are_removed(tmp_path, tokenizer, made):
    path = write(tmp_path / "a.jsonl", ROWS)
    other = write(tmp_path / "b.jsonl", ROWS[:1])
    for file in (path, other):
        load(tokenizer, tmp_path, path=file)
    for entry in entries(tmp_path / "cache"):
        os.utime(entry, (0, 0))
    load(tokenizer, tmp_path, path=path)  # all had been unused, so this one is rebuilt
    assert made == [11, 1, 11]
    assert len(entries(tmp_path / "cache")) == 1
    for entry in entries(tmp_path / "cache"):
        recently = os.stat(entry).st_mtime - (cache_module.KEEP_DAYS - 1) * 24 * 3600
        os.utime(entry, (recently, recently))
    load(tokenizer, tmp_path, path=path)
    load(tokenizer, tmp_path, path=path)
    assert made == [11, 1, 11]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, tokenizer):
    (tmp_path / "cache").write_text("a file")
    train, _ = load(tokenizer, tmp_path, path=write(tmp_path / "a.jsonl", ROWS))
    assert len(tokens(train)) == 11


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation(tmp_path, tokenizer, mode):
    path = write(tmp_path / "a.jsonl", ROWS)
    whole, _ = load(tokenizer, tmp_path, path=path)
    part = slice(None, 9) if mode == "keep_start" else slice(-9, None)
    expected = []
    for example in whole.examples:
        ids, targets = example.tokens[part], np.array(example.targets[part])
        targets[0] = False
        if targets.any():
            expected.append((ids.tolist(), targets.tolist()))
    train, _ = load(tokenizer, tmp_path, path=path, max_length=9, truncation_mode=mode)
    assert tokens(train) == expected
    assert train.report.target_tokens == sum(sum(targets) for _, targets in expected)
    assert train.report.dropped == 11 - len(expected)


def test_held_out_files_are_never_trained_on(tmp_path, tokenizer):
    """Neither where they are, nor as a copy elsewhere."""
    write(tmp_path / "a.jsonl", ROWS[:5])
    held = write(tmp_path / "b.jsonl", ROWS[5:])
    train, test = load(tokenizer, tmp_path, path=str(tmp_path), test_path=held)
    assert (len(train.examples), len(test.examples)) == (5, 6)
    (tmp_path / "elsewhere").mkdir()
    copy = write(tmp_path / "elsewhere" / "c.jsonl", ROWS[5:])
    train, _ = load(tokenizer, tmp_path, path=str(tmp_path), test_path=copy)
    assert len(train.examples) == 5
    with pytest.raises(UserError, match="does not hold out"):
        load(tokenizer, tmp_path, path=held, test_path=copy)
