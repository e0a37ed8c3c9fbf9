"""What a run shows, with a terminal and without."""

from __future__ import annotations

from phi3_jax.training.terminal import Terminal


def test_without_a_terminal_plain_lines_with_time_left(capsys):
    with Terminal(total_steps=100, first_step=0) as terminal:
        terminal.log(10, {"loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 1234.5})
    line = capsys.readouterr().out
    assert line.startswith("step 10/100  loss 2.5000  learning_rate 1.00e-04")
    assert "tokens_per_second 1,234" in line and "left 0:00" in line
    assert line.count("\n") == 1


def test_on_a_terminal_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Terminal(total_steps=100, first_step=0) as terminal:
        terminal.step(10, {"loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 1234.0})
    shown = capsys.readouterr().out
    for part in ("loss 2.5000", "lr 1.00e-04", "1,234 tokens/s", "10/100"):
        assert part in shown
