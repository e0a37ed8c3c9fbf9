"""The time of a run, by a clock that the tests turn."""

from __future__ import annotations

import pytest

from phi3_jax.advice import clock as module
from phi3_jax.advice.clock import StepClock, duration


@pytest.fixture
def turn(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def run(clock: StepClock, turn, shapes: list[int], total: int, compiling: float = 60.0) -> list:
    """The lines of a run like `take_steps`: a step is dispatched before its predecessor is read.

    A position takes a second, and a new shape a minute to compile.
    """
    lines, known = [], set()
    for i, shape in enumerate([*shapes, None]):
        if shape is not None:
            turn(0 if shape in known else compiling)
            known.add(shape)
            clock.dispatch(shape)
        if i:
            turn(shapes[i - 1])
            lines.append(clock.read(shapes[i - 1], total - i))
    return [line for line in lines if line is not None]


def test_compiling_does_not_count(turn):
    lines = run(StepClock(4), turn, [2, 2, 6, 6, 2, 6, 2], total=50)
    # The second shape was compiled while step 2 ran; steps 3 to 5 are the first that count.
    assert lines == [
        "time: 45 steps left of about 4 s, 3 min in all (measured over 3 steps; without compiling, "
        "evaluation, and saving)"
    ]


def test_a_short_run_says_nothing(turn):
    assert run(StepClock(2), turn, [2, 2, 2], total=3) == []


def test_an_evaluation_does_not_count(turn):
    clock = StepClock(1)
    for left in (9, 8, 7):
        clock.dispatch(1)
        assert clock.read(1, left) is None
        clock.pause()
        turn(1000)
    clock.read(1, 7)
    for left in (6, 5):
        turn(1)
        assert clock.read(1, left) is None
    turn(1)
    assert clock.read(1, 4).startswith("time: 4 steps left of about 1 s, 4 s in all")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (89, "89 s"), (90, "2 min"), (3599, "1 h 00 min"), (12_000, "3 h 20 min"),
     (180_000, "2 d 2 h")],
)  # fmt: skip
def test_as_a_person_says_it(seconds, text):
    assert duration(seconds) == text
