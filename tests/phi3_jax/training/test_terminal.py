"""What a run shows, with a terminal and without."""

from __future__ import annotations

import math

import pytest

from phi3_jax.training import terminal as module
from phi3_jax.training.terminal import Terminal

RECORD = {
    "loss": 2.5,
    "mean_token_accuracy": 0.5123,
    "tokens_per_second": 1234.5,
    "tflops_per_second": 12.345,
    "utilization": 0.313,
    "padding": 0.02,
    "grad_norm": 0.5312,
    "learning_rate": 4e-5,
    "epoch": 0.25,
    "examples/chats": 3,
}


@pytest.fixture
def clock(monkeypatch):
    """Moves the clock forward by the seconds given."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_pipe_gets_the_whole_record_on_one_line(capsys):
    with Terminal(total_steps=100, first_step=0) as terminal:
        terminal.log(10, RECORD)
        terminal.log(100, RECORD | {"loss": 4e-5, "tokens_per_second": 9.0})
    first, second = lines(capsys)
    assert first == (
        "step  10/100  loss   2.5000  accuracy  51.2%  grad norm    0.531  lr 4.00e-05  "
        "epoch 0.25    1,234 tokens/s   12.3 TFLOP/s   31% of peak  padding   2%  examples/chats 3"
    )
    assert "loss 4.00e-05" in second and len(first) == len(second)  # aligned


def test_the_time_left_comes_after_the_first_steps_and_without_compiling(capsys, clock):
    with Terminal(total_steps=100, first_step=0) as terminal:
        clock(60.0)  # compiling
        for step in (1, 2, 3):
            terminal.step(step, RECORD)
            terminal.log(step, RECORD)
            clock(2.0)
        terminal.step(100, RECORD)
        terminal.log(100, RECORD)
        terminal.log(100, {"eval_loss": 2.0, "eval_perplexity": 7.389})
    shown = lines(capsys)
    assert ["left" in line for line in shown] == [False, False, True, False, False]
    assert shown[2].endswith("left 3:14")  # 97 steps of 2 s
    assert shown[-1] == "step 100/100  held-out loss 2.0000  perplexity 7.389"


def test_values_that_are_not_finite(capsys):
    Terminal(1, 0).log(1, RECORD | {"loss": math.nan, "grad_norm": math.inf})
    assert "loss      nan" in lines(capsys)[0]


@pytest.mark.parametrize("width", [80, 200])
def test_on_a_terminal_a_bar_and_lines_that_fit(capsys, monkeypatch, width):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    with Terminal(total_steps=100, first_step=0) as terminal:
        terminal.step(10, RECORD)
        terminal.log(10, RECORD)
    shown = capsys.readouterr().out
    for part in ("loss 2.5000", "lr 4.00e-05", "1,234 tokens/s", "10/100"):
        assert part in shown
    (line,) = [line for line in shown.splitlines() if "step  10/100" in line]
    assert "TFLOP/s" in line and "of peak" in line and ("lr 4.00e-05" in line) == (width == 200)
    assert len(line[line.index("step ") :]) <= width


def test_members_of_a_sweep_have_a_line_each(capsys):
    terminal = Terminal(100, 0)
    terminal.compare(10, "loss", {"r=8": 2.5, "r=16": 4e-5})
    assert lines(capsys) == [
        "step  10/100  loss   2.5000  r=8",
        "step  10/100  loss 4.00e-05  r=16",
    ]


def test_warnings_are_heard(capsys):
    heard = []
    Terminal(1, 0, warned=heard.append).print("rows\nwarning: short rows\nmore")
    assert heard == ["warning: short rows"] and len(lines(capsys)) == 3
