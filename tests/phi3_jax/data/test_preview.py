"""The preview: rows token by token, what is learned, what was skipped, in the terminal and HTML."""

from __future__ import annotations

import html.parser
import io
import json
import re

import pytest
from rich.console import Console

from phi3_jax.cli.main import main
from phi3_jax.config.data import DataConfig
from phi3_jax.config.training import TrainingConfig
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.dataset import load_examples
from phi3_jax.data.preview import look, pieces_of
from phi3_jax.data.preview_html import to_html
from phi3_jax.data.preview_text import first_row, print_preview
from phi3_jax.data.tokenizer import load_tokenizer
from tests.phi3_jax.conftest import TOKENIZER, make_config, write_config


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def chat(question, answer):
    return {"messages": [
        {"role": "user", "content": question}, {"role": "assistant", "content": answer},
    ]}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("preview")
    rows = [chat("Hi <b>", "héllo 🙂\nyou & me"), chat("why " * 300, "so"), chat("x", "y " * 40)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n" + '{"question": "?"}\n'
    (folder / "a.jsonl").write_text(text)
    config = DataConfig(
        path=str(folder / "a.jsonl"), cache_dir=str(folder / "cache"), max_length=400,
        pad_to_multiple_of=8, packing=True, on_bad_row="skip",
    )  # fmt: skip
    train, test = load_examples(config, tokenizer)
    plan = BatchPlan.from_config(config, TrainingConfig(output_dir="x"))
    batches = plan.train_batches(train.examples, seed=0)
    return train, batches, look(train, test, batches, tokenizer, count=2)


def test_the_pieces_of_a_row_are_its_tokens(data, tokenizer):
    train, _, _ = data
    example = train.examples[0]
    pieces = pieces_of(example, tokenizer)
    assert [piece.id for piece in pieces] == example.tokens.tolist()
    assert [piece.learned for piece in pieces] == example.targets.tolist()
    shown = "".join(piece.text for piece in pieces if not piece.text.startswith("<0x"))
    assert shown.replace(" ", "") == str(tokenizer.decode(example.tokens)).replace(" ", "").replace(
        "🙂", ""
    )
    assert [piece.text for piece in pieces if piece.special] == [
        "<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|endoftext|>",
    ]  # fmt: skip


def test_what_it_counts(data):
    train, batches, preview = data
    batch = batches[0]
    filled = batch["segment_ids"].reshape(-1, batch["segment_ids"].shape[-1]) > 0
    used = filled[filled.any(axis=1)]
    assert preview.padding == pytest.approx(1 - used.mean())
    assert [(sum(len(s.pieces) for s in row.segments), row.padding) for row in preview.rows] == [
        (int(row.sum()), int((~row).sum())) for row in used[:2]
    ]
    assert sum(count for _, _, count in preview.histogram) == train.report.examples
    assert preview.learned == train.report.target_tokens / train.report.tokens
    assert preview.longest[0][0].endswith("a.jsonl:2")
    assert {(s.kind, s.count, s.first[0][0][-2:]) for s in preview.skipped} == {
        ("unreadable", 1, ":4"), ("unknown columns", 1, ":5"),
    }  # fmt: skip


@pytest.mark.parametrize("packing", [None, "bfd", "bfd_split", "wrapped"])
def test_it_shows_what_training_learns(tmp_path, tokenizer, packing):
    rows = [{"text": f"row {i} " + "word " * (i * 3)} for i in range(9)] + [chat("Hi", "so " * 20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {} if packing is None else {"packing": True, "packing_strategy": packing}
    config = DataConfig(
        path=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"), max_length=16, **own
    )
    train, _ = load_examples(config, tokenizer)
    batches = BatchPlan.from_config(config, TrainingConfig(output_dir="x")).train_batches(
        train.examples, seed=0
    )
    count = batches.batch_size * batches.accumulation
    for number, view in enumerate(look(train, None, batches, tokenizer, count=100).rows):
        batch = batches[number // count]
        tokens, targets = (
            batch[name].reshape(count, -1)[number % count].tolist()
            for name in ("tokens", "targets")
        )
        pieces = [piece for segment in view.segments for piece in segment.pieces]
        assert [piece.id for piece in pieces] + [0] * view.padding == tokens
        assert [piece.learned for piece in pieces] + [False] * view.padding == targets


def test_the_terminal_works_without_color(data, tokenizer):
    train, _, preview = data
    out = io.StringIO()
    print_preview(preview, Console(file=out, width=80))
    text = out.getvalue()
    assert "« héllo" in text and "you & me<|end|>»<|endoftext|>" in text
    assert "segment 1 of" in text and "\x1b" not in text
    assert "skipped: 1 unreadable:" in text and "not valid JSON" in text
    colored = io.StringIO()
    print_preview(preview, Console(file=colored, width=80, force_terminal=True))
    assert "\x1b" in colored.getvalue() and "«" not in colored.getvalue()
    assert "learned between « and »: <|user|>" in first_row(train, tokenizer)


class Page(html.parser.HTMLParser):
    """The tokens of a page, and whatever would ask the network."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tokens, self.links, self.inside = [], [], None

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag == "span" and "title" in given:
            self.inside = (
                int(given["title"].split()[1].rstrip(",")),
                "l" in given["class"].split(),
            )
            self.tokens.append(self.inside)


def test_the_page_has_every_token_and_needs_no_network(data, tokenizer):
    train, _, preview = data
    page = Page()
    text = to_html(preview, "a <title>")
    page.feed(text)
    assert not page.links and not re.search(r"url\(|@import|<script", text)
    assert page.tokens == [
        (piece.id, piece.learned)
        for row in preview.rows
        for segment in row.segments
        for piece in segment.pieces
    ]
    assert "a &lt;title&gt;" in text and "<b>" not in text


def test_the_command(checkpoint, chats, tmp_path, capsys):
    config = write_config(make_config(checkpoint, chats, tmp_path / "out"), tmp_path / "c.yaml")
    assert main(["preview", "--config", str(config), "--rows", "1"]) == 0
    assert "--- row 1:" in capsys.readouterr().out
    page = tmp_path / "p.html"
    assert main(["preview", "--config", str(config), "--html", str(page)]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not (tmp_path / "out").exists()
    assert main(["preview", "--config", str(config), "--rows", "0"]) == 2


@pytest.mark.parametrize(("bad", "held"), [(True, False), (False, True), (True, True)])
def test_it_says_that_train_would_stop(checkpoint, chats, tmp_path, capsys, bad, held):
    lines = chats.read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:3]) + "{broken\n" * bad)
    (tmp_path / "b.jsonl").write_text("".join(lines[3:5]) + "{broken\n" * held)
    own = {"path": str(tmp_path / "a.jsonl"), "test_path": str(tmp_path / "b.jsonl")}
    own["cache_dir"] = str(tmp_path / "cache")
    config = write_config(make_config(checkpoint, chats, tmp_path, own), tmp_path / "c.yaml")
    assert main(["preview", "--config", str(config)]) == 0
    said = f"phi3-jax train would stop at the first of these {bad + held} rows"
    assert said in capsys.readouterr().out
    assert main(["preview", "--config", str(config), "data.on_bad_row=skip"]) == 0
    assert "would stop" not in capsys.readouterr().out


def test_everything_that_is_left_out_is_listed(tmp_path, tokenizer):
    rows = [*({"question": str(i)} for i in range(7)), chat("a", "b"), chat("why " * 90, "so")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [{"text": f"row {i}"} for i in range(3)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (tmp_path / "held.jsonl").write_text(json.dumps(chat("a", "b")) + "\n{broken\n")
    config = DataConfig(
        path=str(tmp_path), test_path=str(tmp_path / "held.jsonl"), max_length=32,
        cache_dir=str(tmp_path / "cache"), on_bad_row="skip",
    )  # fmt: skip
    train, test = load_examples(config, tokenizer)
    plan = BatchPlan.from_config(config, TrainingConfig(output_dir="x"))
    preview = look(train, test, plan.train_batches(train.examples, seed=0), tokenizer, count=1)
    assert [(skipped.kind, skipped.count) for skipped in preview.skipped] == [
        ("unknown columns", 7),
        ("also held out", 1),
        ("with nothing to learn within max_length", 1),
        ("unreadable (held-out)", 1),
    ]
    places = [skipped.first[0][0].rpartition("/")[2] for skipped in preview.skipped[1:]]
    assert places == ["a.jsonl:8", "a.jsonl:9", "held.jsonl:2"]
    page, out = to_html(preview, "x"), io.StringIO()
    assert all(f"a.jsonl:{line}<" in page for line in range(1, 10))
    print_preview(preview, Console(file=out, width=200))
    assert "and 2 more; --html lists them" in out.getvalue()
