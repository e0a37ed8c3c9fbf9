"""Files to examples: formats, splits, and every bad row by its line."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.config.data import DataConfig
from phi3_jax.data.dataset import load_examples
from phi3_jax.data.loading import load_held_out
from phi3_jax.data.tokenizer import load_tokenizer
from tests.phi3_jax.conftest import TOKENIZER

CHAT = {"messages": [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"},
]}  # fmt: skip
SAME_CHAT = [
    CHAT,
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello you"}]},
    {"instruction": "Hi", "output": "Hello you"},
    {"instruction": "Hi", "input": "", "output": "Hello you"},
    {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
    {"conversation": [{"input": "Hi", "output": "Hello you", "system": ""}]},
    {
        "messages": [
            {"from": "human", "role": "User", "content": "Hi", "value": "Hi"},
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hello you", "annotations": []}],
            },
        ]
    },
]
SAME = ["messages", "sharegpt", "alpaca", "no-input", "pc", "rounds", "twice"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize("row", SAME_CHAT, ids=SAME)
def test_formats_of_one_chat_give_one_example(tmp_path, tokenizer, row):
    (example,) = load_examples(DataConfig(path=write(tmp_path / "a.jsonl", [row])), tokenizer)[
        0
    ].examples
    ids = tokenizer.apply_chat_template(CHAT["messages"])["input_ids"]
    assert example.tokens.tolist() == ids
    assert tokenizer.decode(example.tokens[example.targets]) == "Hello you<|end|>"


def test_alpaca_input_is_worded_as_in_the_guide(tmp_path, tokenizer):
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    (example,) = load_examples(DataConfig(path=write(tmp_path / "a.jsonl", [row])), tokenizer)[
        0
    ].examples
    assert "Add\n Input: 1 2<|end|>" in tokenizer.decode(example.tokens)


def test_the_text_column_by_another_name(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"body": "Once"}])
    train, _ = load_examples(DataConfig(path=path, dataset_text_field="body"), tokenizer)
    assert tokenizer.decode(train.examples[0].tokens) == "<s> Once<|endoftext|>"


def test_prompt_and_completion_as_text(tmp_path, tokenizer):
    row = {"prompt": "2+2=", "completion": "4 of course"}
    (example,) = load_examples(DataConfig(path=write(tmp_path / "a.jsonl", [row])), tokenizer)[
        0
    ].examples
    whole = tokenizer("2+2=4 of course")["input_ids"]
    assert example.tokens.tolist() == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(example.tokens[example.targets]) == "4 of course<|endoftext|>"


def test_segments_as_axolotl_reads_them(tmp_path, tokenizer):
    parts = [(True, "<s>Hello\n"), (True, "hi there!. "), (False, "goodbye "), (1, "farewell</s>")]
    row = {"segments": [{"label": label, "text": text} for label, text in parts]}
    path = write(tmp_path / "a.jsonl", [row])
    (example,) = load_examples(DataConfig(path=path), tokenizer)[0].examples
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in parts]
    assert example.tokens.tolist() == sum(ids, [])
    learned = [bool(label) for (label, _), own in zip(parts, ids, strict=True) for _ in own]
    assert example.targets.tolist() == [False, *learned[1:]]


def test_text_and_all_tokens(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "Once upon a time"}])
    (example,) = load_examples(DataConfig(path=path), tokenizer)[0].examples
    assert example.targets.tolist() == [False] + [True] * (len(example.tokens) - 1)
    assert example.tokens[-1] == tokenizer.eos_token_id
    path = write(tmp_path / "b.jsonl", [CHAT])
    (example,) = load_examples(DataConfig(path=path, assistant_only_loss=False), tokenizer)[
        0
    ].examples
    assert example.targets.tolist() == [False] + [True] * (len(example.tokens) - 1)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_file_types(tmp_path, tokenizer, suffix):
    rows = [{"instruction": f"Say {i}", "output": f"{i}"} for i in range(5)]
    path = tmp_path / f"a.{suffix}"
    table = datasets.Dataset.from_list(rows)
    if suffix == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif suffix == "jsonl":
        write(path, rows)
    else:
        getattr(table, f"to_{suffix}")(str(path))
    train, test = load_examples(DataConfig(path=str(path), split="train[1:4]"), tokenizer)
    assert [tokenizer.decode(e.tokens[e.targets]) for e in train.examples] == [
        "1<|end|>", "2<|end|>", "3<|end|>",
    ]  # fmt: skip
    assert test is None


def test_folder_of_splits(tmp_path, tokenizer):
    for name in ("train_sft-0", "train_sft-1", "test_sft"):
        write(tmp_path / f"{name}.jsonl", [{"text": name}] * 2)
    config = DataConfig(path=str(tmp_path), split="train_sft", test_split="test_sft[:1]")
    train, test = load_examples(config, tokenizer)
    assert (len(train.examples), len(test.examples)) == (4, 1)
    with pytest.raises(UserError, match="no file of split 'dev'"):
        load_examples(DataConfig(path=str(tmp_path), split="dev"), tokenizer)


def test_test_size_holds_out_what_datasets_would(tmp_path, tokenizer):
    rows = [{"text": f"row {i}"} for i in range(20)]
    config = DataConfig(path=write(tmp_path / "a.jsonl", rows), test_size=0.25, split_seed=1234)
    train, test = load_examples(config, tokenizer)
    parts = datasets.Dataset.from_list(rows).train_test_split(0.25, seed=1234)
    for split, part in ((train, parts["train"]), (test, parts["test"])):
        texts = [tokenizer.decode(e.tokens, skip_special_tokens=True) for e in split.examples]
        assert texts == part["text"]


def test_cut_and_dropped_rows_are_counted(tmp_path, tokenizer):
    def chat(question, answer):
        return {"messages": [
            {"role": "user", "content": question}, {"role": "assistant", "content": answer},
        ]}  # fmt: skip

    rows = [CHAT, chat("Hi", "so " * 50), chat("why " * 50, "Because")]
    config = DataConfig(path=write(tmp_path / "a.jsonl", rows), max_length=20)
    train, _ = load_examples(config, tokenizer)
    report = train.report
    assert (report.rows, report.examples, report.cut, report.dropped) == (3, 2, 1, 1)
    assert max(len(e.tokens) for e in train.examples) == 20
    assert "1 cut" in str(report) and "1 dropped" in str(report)


def test_split_rows_lose_nothing_but_what_teaches_nothing(tmp_path, tokenizer):
    rows = [{"text": "so " * 50}, CHAT]
    path = write(tmp_path / "a.jsonl", rows)
    whole, _ = load_examples(DataConfig(path=path), tokenizer)
    settings = {"packing": True, "packing_strategy": "bfd_split", "max_length": 20}
    train, _ = load_examples(DataConfig(path=path, **settings), tokenizer)
    lengths = [len(example.tokens) for example in train.examples]
    assert lengths == [20, 20, len(whole.examples[0].tokens) - 40, len(whole.examples[1].tokens)]
    tokens = np.concatenate([example.tokens for example in train.examples])
    assert (tokens == np.concatenate([example.tokens for example in whole.examples])).all()
    assert "1 rows split" in str(train.report)
    write(tmp_path / "test.jsonl", [{"text": "no " * 50}, {"text": "Bye"}])
    held, test = load_examples(
        DataConfig(path=str(tmp_path), test_split="test", eval_packing=False, **settings), tokenizer
    )
    assert (len(held.examples), len(test.examples)) == (4, 2)


# fmt: off
BAD_ROWS = [
    ("{not json", "not valid JSON"),
    ('{"question": "x"}', "match no known format"),
    ('{"messages": "hello"}', "expected a list of messages"),
    ('{"messages": []}', "expected a list of messages"),
    ('{"messages": [{"role": "user", "content": 5}]}', r"messages\[0\].content: expected text"),
    ('{"messages": [{"role": "user", "content": "Hi"}]}', "no assistant turn to learn"),
    ('{"conversations": [{"from": "narrator", "value": "x"}]}', "from is 'narrator'"),
    ('{"messages": [{"role": "assistant", "content": "Hi", "weight": 0.5}]}', "0.5 cannot be"),
    ('{"messages": [{"role": "assistant", "content": "Hi", "train_detail": [1]}]}', "a part of a"),
    ('{"messages": [{"role": "user", "content": "Hi", "train": true}]}', "marked as learned"),
    ('{"messages": [{"role": "critic", "content": "Hi"}]}', r"messages\[0\] \(critic\): content"),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "type 'image_url'"),
    ('{"messages": [{"role": "user", "content": "a \\ud83d b"}, '
     '{"role": "assistant", "content": "Hi"}]}', "lone surrogate"),
    ('{"text": "a", "text": "b"}', "duplicate key 'text'"),
    ('{"text": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    ('{"messages": [{"role": "tool", "content": ' + "[" * 900 + "]" * 900 + "}]}", "a part"),
    ('{"text": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ('{"messages": [{"role": "assistant", "content": null, "tool_calls": 5}]}', "a list of calls"),
    ('{"messages": [{"role": "user", "content": "Hi"}], "tools": 7}', "a list of functions"),
    ('{"instruction": "a", "output": "b", "history": [["c"]]}', "a question and an answer"),
    ('{"system": "a", "messages": [{"role": "system", "content": "b"}, '
     '{"role": "assistant", "content": "c"}]}', "a system column and a system message"),
    ('{"prompt": "x", "completion": ["y"]}', "both be texts or both lists"),
    ("[1, 2]", "expected an object"),
    ('{"conversations": [{"from": "gpt", "value": "a", "content": "b"}]}', "value and content con"),
    ('{"messages": [{"from": "gpt", "role": "user", "content": "b"}]}', "from and role contradict"),
    ('{"messages": [{"from": 1, "role": [2], "content": "b"}]}', "from and role contradict"),
    ('{"conversation": [{"input": "a", "output": "b", "x": 1}]}', "x beside its input and output"),
    ('{"conversation": [{"input": "a", "output": null}]}', r"\[0\].output.content: expected"),
    ('{"segments": [{"text": "a", "label": "yes"}]}', r"segments\[0\].label: expected true"),
    ('{"segments": [{"text": "a", "label": false}]}', "nothing to learn"),
]
# fmt: on


def test_a_report_of_odd_column_names_can_be_printed(tmp_path, tokenizer):
    row = '{"question": "q", "answer": "a", "": 1, "\\ud83d": 2}'
    (tmp_path / "a.jsonl").write_text(row + "\n")
    split, _ = load_examples(DataConfig(path=str(tmp_path / "a.jsonl")), tokenizer)
    assert str(split.report).endswith(r"not used: a column without a name, \ud83d")
    assert str(split.report).isascii()
    columns = {"system": "persona", "tools": "abilities"}
    (tmp_path / "a.jsonl").write_text(row + "\n" + row.replace("}", ', "abilities": []}') + "\n")
    config = DataConfig(path=str(tmp_path / "a.jsonl"), columns=columns)
    report = str(load_examples(config, tokenizer)[0].report)
    assert report.endswith("named in the config, but in no row: persona")


@pytest.mark.parametrize(
    ("line", "message"), BAD_ROWS, ids=[f"bad{i}" for i in range(len(BAD_ROWS))]
)
def test_bad_row_stops_with_file_and_line_or_is_skipped(tmp_path, tokenizer, line, message):
    path = write(tmp_path / "a.jsonl", [CHAT, "", line, CHAT])
    with pytest.raises(UserError, match=message) as caught:
        load_examples(DataConfig(path=path), tokenizer)
    assert str(caught.value).startswith(f"{path}:3: ")
    train, _ = load_examples(DataConfig(path=path, on_bad_row="skip"), tokenizer)
    assert (train.report.examples, train.report.skipped) == (2, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": "/nowhere/a.jsonl"}, "no such file or folder"),
        ({"path": "no/such-data-set"}, "not available on the hub"),
        ({"split": "test"}, "a file has the split train"),
        ({"test_size": 5}, "test_size"),
        ({"format": "text"}, "format text needs text"),
    ],
)
def test_bad_source(tmp_path, tokenizer, config, message):
    path = write(tmp_path / "a.jsonl", [CHAT])
    with pytest.raises(UserError, match=message):
        load_examples(DataConfig.model_validate({"path": path} | config), tokenizer)


def test_no_example_left(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ["nonsense"])
    with pytest.raises(UserError, match="no train examples left"):
        load_examples(DataConfig(path=path, on_bad_row="skip"), tokenizer)


@pytest.mark.parametrize(
    ("split", "test_split", "count"),
    [("train", "train[:5%]", 1), ("train[:50%]", "train[40%:]", 2), ("train[5:]", "train[:5]", 0)],
)
def test_a_held_out_row_is_not_trained_on(tmp_path, tokenizer, split, test_split, count):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20)))
    own = {"cache_dir": str(tmp_path / "cache"), "test_split": test_split}
    config = DataConfig(path=str(path), split=split, **own)
    if not count:
        train, test = load_examples(config, tokenizer)
        assert len(train.examples) + len(test.examples) == 20
        return
    with pytest.raises(UserError, match=f"a.jsonl: {count} rows are both trained on and held out"):
        load_examples(config, tokenizer)
    # By another source, too.
    sources = [{"path": str(path), "split": "train[:9]"}, {"path": str(path)}]
    with pytest.raises(UserError, match=".jsonl: .* rows are both .*slices that do not overlap"):
        load_examples(DataConfig.model_validate(own | {"sources": sources}), tokenizer)
    own |= {"test_split": None, "test_size": 0.5}
    with pytest.raises(UserError, match=".jsonl: .* rows are both .*in only one of data.sources"):
        load_examples(DataConfig.model_validate(own | {"sources": sources}), tokenizer)


@pytest.mark.parametrize(
    ("row", "mode"),
    [*((row, "path") for row in SAME_CHAT), (SAME_CHAT[1], "split"), (SAME_CHAT[2], "sources")],
    ids=[*SAME, "split", "sources"],
)
def test_a_row_that_is_held_out_in_another_file_and_format_is_left_out(
    tmp_path, tokenizer, row, mode
):
    flagged = {"messages": [CHAT["messages"][0], {**CHAT["messages"][1], "train": True}]}
    other = {"instruction": "Why?", "output": "Because."}
    (tmp_path / "d").mkdir()
    train = write(tmp_path / "d" / "train.jsonl", [other, CHAT, flagged, row, other])
    test = write(tmp_path / "d" / "test.jsonl", [row, {"instruction": "Who?", "output": "Me."}])
    config = {
        "path": {"path": train, "test_path": test},
        "split": {"path": str(tmp_path / "d"), "test_split": "test"},
        "sources": {"sources": [{"path": train}, {"path": train}], "test_path": test},
    }[mode]
    split, held_out = load_examples(DataConfig.model_validate(config), tokenizer)
    assert len(held_out.examples) == 2 and not held_out.report.held_out
    sources = 2 if mode == "sources" else 1
    assert (len(split.examples), split.report.held_out) == (2 * sources, 3 * sources)
    assert f"{3 * sources} left out: a held-out row has the same tokens" in str(split.report)
    why = tokenizer.apply_chat_template(CHAT["messages"])["input_ids"]
    assert all(example.tokens.tolist() != why for example in split.examples)


def test_a_row_is_held_out_whatever_of_it_is_learned(tmp_path, tokenizer):
    turns = [*CHAT["messages"], *CHAT["messages"]]
    half = [turns[0], {**turns[1], "train": False}, *turns[2:]]
    train = write(tmp_path / "train.jsonl", [CHAT, {"messages": turns}])
    test = write(tmp_path / "held.jsonl", [{"messages": half}])
    split, _ = load_examples(DataConfig(path=train, test_path=test), tokenizer)
    assert (len(split.examples), split.report.held_out) == (1, 1)
    test = write(tmp_path / "held.jsonl", [{"messages": turns}, CHAT])
    with pytest.raises(UserError, match="no train examples left .* 2 left out: a held-out row"):
        load_examples(DataConfig(path=train, test_path=test), tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_rows_are_read_without_the_training_rows(tmp_path, tokenizer, streaming):
    train = write(tmp_path / "train.jsonl", ["{broken", CHAT])
    test = write(tmp_path / "held.jsonl", [CHAT, {"text": "more"}])
    config = DataConfig(path=train, test_path=test, streaming=streaming)
    held_out = load_held_out(config, tokenizer)
    assert held_out.report.examples == 2
    assert load_held_out(DataConfig(path=train, streaming=streaming), tokenizer) is None


def test_test_size_counts_the_rows_that_are_on_both_sides(tmp_path, tokenizer):
    rows = [{"text": f"row {i % 10}"} for i in range(20)]
    config = DataConfig(path=write(tmp_path / "a.jsonl", rows), test_size=4)
    split, held_out = load_examples(config, tokenizer)
    assert (len(split.examples), len(held_out.examples)) == (16, 4)
    own = {tuple(e.tokens.tolist()) for e in held_out.examples}
    both = sum(tuple(e.tokens.tolist()) in own for e in split.examples)
    assert split.report.repeated == both > 0
    assert f"{both} have the tokens of a held-out row (data.test_size" in str(split.report)
