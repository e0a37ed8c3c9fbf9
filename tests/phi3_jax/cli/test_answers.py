"""Answers that do not break: what outgrows the model, and bytes that are not text."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal

import pytest

import phi3_jax
from phi3_jax.cli import main as cli
from phi3_jax.data.tokenizer import load_tokenizer
from tests.phi3_jax.conftest import chats, checkpoint, make_config, write_config  # noqa: F401

LONG = "tea " * 200


@pytest.fixture(scope="module")
def short_model(checkpoint, tmp_path_factory):  # noqa: F811
    """The tiny checkpoint with 128 positions."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("short") / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": 128, "original_max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def type_in(monkeypatch, data: bytes, terminal: bool = False) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(stdin, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stdin", stdin)


def test_a_chat_goes_on_when_the_context_is_full(short_model, monkeypatch, capsys):
    """The oldest turns are dropped, the system message stays, too long a message is left out."""
    lines = ["tell me about the sea and ships"] * 4 + [LONG, "again", "/quit"]
    type_in(monkeypatch, "\n".join(lines).encode())
    prompts = []
    stream = phi3_jax.stream

    def recorded(model, prompt, **settings):
        prompts.append(list(prompt))
        yield from stream(model, prompt, **settings)

    monkeypatch.setattr(phi3_jax, "stream", recorded)
    arguments = ("--model", short_model, "--max-new-tokens", 40, "--system", "Be brief.")
    code, out, _ = run(capsys, "chat", *arguments)
    assert code == 0 and out.count("model:") == 5
    assert "dropped the 2 oldest messages" in out and "this message is too long" in out
    assert all(len(prompt) + 40 <= 128 for prompt in prompts)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 1  # the system message
    assert max(map(len, prompts)) > len(prompts[0])


def test_ctrl_c_ends_an_answer_and_not_the_chat(short_model, monkeypatch, capsys):
    """What was said stays in the history; a question without an answer does not."""
    type_in(monkeypatch, b"tell me about tea\nand rain?\nand rain?\n/quit")
    prompts = []
    stream = phi3_jax.stream

    def interrupted(model, prompt, **settings):
        prompts.append(list(prompt))
        for count, token in enumerate(stream(model, prompt, **settings)):
            if count == {1: 4, 2: 0}.get(len(prompts)):
                os.kill(os.getpid(), signal.SIGINT)
            yield token

    monkeypatch.setattr(phi3_jax, "stream", interrupted)
    code, out, _ = run(capsys, "chat", "--model", short_model, "--max-new-tokens", 8)
    assert code == 0 and out.count("model:") == 3 and out.count("stopped") == 2
    assert len(prompts[1]) > len(prompts[0]) and prompts[2] == prompts[1]


def test_each_answer_of_a_chat_is_drawn_anew(short_model, monkeypatch, capsys):
    """The same message has another answer the second time, and the same ones in the next chat."""
    arguments = ("--model", short_model, "--max-new-tokens", 6, "--temperature", 1, "--seed", 3)
    talks = []
    for _ in range(2):
        type_in(monkeypatch, b"tea\n/reset\ntea\n/quit")
        code, out, _ = run(capsys, "chat", *arguments)
        assert code == 0
        talks.append([part.split("\n")[0] for part in out.split("model:")[1:]])
    first, second = talks[0]
    assert first != second and talks[1] == talks[0]


def test_an_answer_that_ends_within_a_character(short_model, monkeypatch, capsys):
    tokenizer = load_tokenizer(short_model)
    tokens = [*tokenizer.encode("tea", add_special_tokens=False)]
    tokens.append(tokenizer.convert_tokens_to_ids("<0xE2>"))
    monkeypatch.setattr(phi3_jax, "stream", lambda *_, **__: iter(tokens))
    type_in(monkeypatch, b"tell me\n/quit")
    code, out, _ = run(capsys, "chat", "--model", short_model)
    assert code == 0 and tokenizer.decode(tokens) == "tea\ufffd" and "tea\ufffd" in out


def test_sigterm_ends_a_chat_in_an_answer(short_model, monkeypatch, capsys):
    type_in(monkeypatch, b"tell me about tea\n/quit")
    monkeypatch.setattr(
        phi3_jax, "stream", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) or iter(())
    )
    code, _, err = run(capsys, "chat", "--model", short_model)
    assert code == 143 and "phi3-jax chat: stopped by SIGTERM" in err


def test_what_stands_before_a_chat(short_model, monkeypatch, capsys):
    """A byte order mark is no text; a system message needs room beside it."""
    said = []
    for data in (b"tea\n", b"\xef\xbb\xbftea\n"):
        type_in(monkeypatch, data)
        said.append(run(capsys, "chat", "--model", short_model, "--max-new-tokens", 3))
    assert said[0][0] == 0 and said[0] == said[1]
    code, out, err = run(capsys, "chat", "--model", short_model, "--system", LONG)
    assert code == 2 and "model:" not in out
    assert err.startswith("phi3-jax chat: --system: with it the prompt has") and "128" in err


def test_a_chat_with_more_new_tokens_than_positions(short_model, monkeypatch, capsys):
    type_in(monkeypatch, b"tell me about tea\nand rain\n")
    code, out, _ = run(capsys, "chat", "--model", short_model, "--max-new-tokens", 500)
    assert code == 0 and out.count("model:") == 2
    assert out.count("cut off at the model's 128 positions") <= 2


def test_generate_answers_what_fits(short_model, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"\ufeffTell me about tea.\n\n  \n{LONG}\r\nAnd rain?\n".encode())
    common = ("--model", short_model, "--max-new-tokens", 6)
    code, out, err = run(capsys, "generate", "--file", file, *common)
    assert code == 0 and "prompt 2 was not answered" in err and "prompt 1" not in err
    _, first, _ = run(capsys, "generate", "Tell me about tea.", *common)
    _, last, _ = run(capsys, "generate", "And rain?", *common)
    assert out == first + last
    # With room for fewer tokens than asked for, the answer is the beginning of the longer one.
    code, cut, err = run(capsys, "generate", "Tell me about tea.", *common[:2])
    assert code == 0 and cut.startswith(first.rstrip("\n"))
    assert "cut off at the model's 128 positions" in err or "\ufffd" in cut or not err
    code, _, err = run(capsys, "generate", LONG, *common)
    assert code == 2 and "no prompt leaves room for an answer" in err
    file.write_text("\n \n")
    code, _, err = run(capsys, "generate", "--file", file, *common)
    assert code == 2 and "no prompts" in err


def test_bytes_that_are_not_utf8(short_model, tmp_path, monkeypatch, capsys):
    bad = b"caf\xe9".decode(errors="surrogateescape")
    common = ("--model", short_model, "--max-new-tokens", 2)
    for arguments in (["generate", bad], ["generate", "--raw", bad], ["chat", "--system", bad]):
        code, _, err = run(capsys, *arguments, *common)
        assert code == 2 and "not valid UTF-8" in err and err.count("\n") == 1
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9\n")
    code, _, err = run(capsys, "generate", "--file", tmp_path / "prompts.txt", *common)
    assert code == 2 and "prompts.txt" in err and "utf-8" in err
    type_in(monkeypatch, b"caf\xe9\n/quit\n")
    code, _, err = run(capsys, "chat", *common)
    assert code == 2 and "the input is not valid UTF-8" in err and err.count("\n") == 1
    type_in(monkeypatch, b"caf\xe9\ntea\n/quit\n", terminal=True)
    code, out, _ = run(capsys, "chat", *common)
    assert code == 0 and "not valid UTF-8" in out and out.count("model:") == 1


def test_evaluate_counts_what_does_not_fit(short_model, chats, tmp_path, capsys):  # noqa: F811
    """A row that has room for fewer tokens is answered, one that fills the model is counted."""
    rows = [
        [{"role": "user", "content": "tea " * n}, {"role": "assistant", "content": "yes it is."}]
        for n in (5, 90, 119)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = {"test_path": str(file), "max_length": 128}
    config = make_config(short_model, chats, tmp_path / "run", data, max_steps=2)
    config_file = write_config(config, tmp_path / "config.yaml")
    code, out, err = run(capsys, "evaluate", "--config", config_file, "--output", tmp_path / "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["questions"] == {"answered": 3, "shortened": 2, "unanswered": 0}
    assert found["base"]["loss"] > 0 and found["base"]["rouge1"] >= 0
    assert "2 of them with room for fewer new tokens" in out
