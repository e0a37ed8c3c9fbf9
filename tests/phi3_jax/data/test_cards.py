"""A downloaded repository has the rows that `datasets` finds in it by the header of its README."""

from __future__ import annotations

import json
import textwrap

import datasets
import fsspec
import pytest

from phi3_jax import UserError
from phi3_jax.data import reading
from phi3_jax.data.reading import find_files, held_out_split, remote_files
from phi3_jax.data.remote import Remote
from tests.phi3_jax.data.test_files import rows

# Files by their names, each with one row that says which file it is in.
FILES = (
    *("main.jsonl", "extra.jsonl", "a/part-1.jsonl", "a/part-2.jsonl", "a/deep/part-3.jsonl"),
    *("b/train.jsonl", "b/test.jsonl", "b/notes.json", "data/train-00000-of-00001.jsonl"),
    *("data/test-00000-of-00001.jsonl", "__old__/main.jsonl", ".hidden/main.jsonl"),
    *("c/train/x.jsonl", "c/validation/y.jsonl"),
)
# Headers, the configuration that is asked for, and the splits.
CARDS = {
    "one text": ("- {config_name: x, data_files: main.jsonl}", None),
    "one list": ("- {config_name: x, data_files: [main.jsonl, extra.jsonl]}", None),
    "one glob": ("- {config_name: x, data_files: 'a/*.jsonl'}", None),
    "deep glob": ("- {config_name: x, data_files: ['a/**/*.jsonl', 'none/*.jsonl']}", None),
    "everything": ("- {config_name: x, data_files: '**/*.jsonl'}", None),
    "folder": ("- {config_name: x, data_files: 'a/**'}", None),
    "the default": (
        "- {config_name: x, data_files: main.jsonl}\n"
        "- {config_name: y, data_files: extra.jsonl, default: true}",
        None,
    ),
    "called default": (
        "- {config_name: x, data_files: main.jsonl}\n"
        "- {config_name: default, data_files: extra.jsonl}",
        None,
    ),
    "by name": (
        "- {config_name: x, data_files: main.jsonl}\n"
        "- {config_name: y, data_files: extra.jsonl, default: true}",
        "x",
    ),
    "splits": (
        """
        - config_name: x
          data_files:
          - {split: train, path: [main.jsonl, 'a/*']}
          - {split: test_sft, path: extra.jsonl}
          - {split: validation, path: 'c/validation/*.jsonl'}
        """,
        None,
    ),
    "folder of its own": ("- {config_name: x, data_dir: b}", None),
    "folder with splits": ("- {config_name: x, data_dir: c}", "x"),
    "folder and files": ("- {config_name: x, data_dir: a, data_files: '*.jsonl'}", None),
    "hub's names": ("- {config_name: x}", None),
    "hidden": ("- {config_name: x, data_files: '.hidden/*.jsonl'}", None),
    "special": ("- {config_name: x, data_files: '__old__/*.jsonl'}", None),
    "twice": ("- {config_name: x, data_files: [main.jsonl, 'm*.jsonl']}", None),
}


def write(folder, configs, files=FILES):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps({"text": file}) + "\n")
    listed = textwrap.dedent(configs).strip("\n")
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{listed}\n---\n# Chats\n")


@pytest.mark.parametrize("case", CARDS)
def test_rows_are_those_of_datasets(tmp_path, case):
    configs, name = CARDS[case]
    folder = tmp_path / "chats [1]" if case == "one text" else tmp_path / "chats"
    folder.mkdir()
    write(folder, configs)
    plain = tmp_path / "plain"  # `datasets` takes brackets in a folder's name for a pattern
    plain.mkdir()
    write(plain, configs)
    theirs = datasets.load_dataset(str(plain), name, cache_dir=str(tmp_path / "cache"))
    for split in theirs:
        assert rows(folder, split, name) == list(theirs[split]), split
    half = datasets.ReadInstruction.from_spec("train[:50%]").to_absolute(
        {"train": len(theirs["train"])}
    )[0]
    assert rows(folder, "train[:50%]", name) == list(theirs["train"])[: half.to]
    with pytest.raises(UserError, match="no split 'other'; its README.md has train"):
        rows(folder, "other", name)


def test_remote_folders_are_read_alike(tmp_path):
    files = fsspec.filesystem("memory")
    try:
        for case, (configs, name) in CARDS.items():
            (tmp_path / case).mkdir()
            write(tmp_path / case, configs)
            files.put(f"{tmp_path / case}/", f"/cards/{case}/", recursive=True)
            local = find_files(str(tmp_path / case), name, "train").files
            remote, _ = remote_files(Remote.open(f"memory://cards/{case}"), name, "train")
            own = [file.path.relative_to(tmp_path / case) for file in local]
            assert list(map(str, remote)) == list(map(str, own)), case
    finally:
        files.rm("/cards", recursive=True)


def test_the_held_out_split_is_the_cards(tmp_path):
    write(tmp_path, CARDS["splits"][0])
    assert held_out_split(str(tmp_path)) == "validation"
    write(tmp_path, CARDS["one text"][0])
    assert held_out_split(str(tmp_path)) == "train"


def test_a_header_of_its_own_file_counts(tmp_path):
    write(tmp_path, CARDS["one text"][0])
    (tmp_path / ".huggingface.yaml").write_text("configs: [{config_name: y, data_files: 'a/*'}]")
    theirs = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows(tmp_path) == list(theirs)


@pytest.mark.parametrize(
    ("configs", "name", "problem"),
    [
        (
            "- {config_name: x, data_files: main.jsonl}\n- {config_name: y, data_files: a.csv}",
            None,
            "several configurations and none is the default; choose one with data.name: x, y",
        ),
        ("- {config_name: x, data_files: main.jsonl}", "z", "no configuration 'z'; data.name: x"),
        ("- {config_name: x, data_files: gone.jsonl}", None, "config 'x': no file gone.jsonl"),
        (
            "- {config_name: x, data_files: 'gone/*'}",
            None,
            "split 'train': no .* files; found none",
        ),
        ("- {config_name: x, data_files: ../up.jsonl}", None, "../up.jsonl is not a file in"),
        ("- {config_name: x, data_files: 7}", None, "config 'x': "),
        ("- {config_name: x, data_files: [{split: a}]}", None, "Invalid format for data_files"),
        ("- {config_name: x, data_dir: gone}", None, "doesn't contain any data files"),
        ("- {data_files: main.jsonl}", None, "expected a list of items with config_name"),
        ("- main.jsonl", None, "expected a list of items with config_name"),
        ("- {config_name: x, data_files: main.jsonl, field: a}", None, "sets field: 'a', which is"),
        ("- {config_name: x, data_files: main.csv, sep: ';'}", None, "sets sep: ';', which is not"),
        ("- {config_name: [x", None, "README.md: not valid YAML"),
        (
            "- {config_name: x, default: true}\n- {config_name: default}",
            None,
            "several default configs: x, default",
        ),
    ],
)
def test_one_clear_error(tmp_path, configs, name, problem):
    write(tmp_path, configs, ["main.jsonl", "main.csv"])
    with pytest.raises(UserError, match=problem) as caught:
        rows(tmp_path, name=name)
    assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["# Chats\n", "---\nlicense: mit\n---\n", "", "--- \n-- a\n"])
def test_a_card_without_configurations_decides_nothing(tmp_path, text):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "README.md").write_text(text)
    assert rows(tmp_path) == [{"text": "a"}]


def test_a_hub_id_with_several_configurations_names_them(tmp_path, monkeypatch):
    write(tmp_path, "- {config_name: x, data_files: a.csv}\n- {config_name: y, data_files: b.csv}")
    (tmp_path / "a.csv").write_text("text\na\n")
    load = datasets.load_dataset

    def local(path, name, **settings):
        return load(str(tmp_path), name, cache_dir=str(tmp_path / "cache"), **settings)

    monkeypatch.setattr(reading.datasets, "load_dataset", local)
    with pytest.raises(UserError, match=r"Config name is missing.*\['x', 'y'\] \(data.name\)"):
        find_files("someone/chats", None, "train")
