"""Broken input at every boundary: it works, or one line says what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults import boundaries
from tests.faults.boundaries import Sound


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize(
    ("boundary", "examples"),
    [
        (boundaries.config, 120),
        (boundaries.rows, 100),
        (boundaries.model, 60),
        (boundaries.adapter, 50),
        (boundaries.tokenizer, 50),
        (boundaries.checkpoint, 20),
        (boundaries.records, 50),
        (boundaries.recipe, 60),
        (boundaries.report, 20),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_works_or_says_why_not(sound, boundary, examples):
    seen = set()

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def run(dice):
        seen.add(boundary(dice, sound))

    run()
    # What a run finds of its own in its folder is never a reason to refuse it.
    own = boundary in (boundaries.records, boundaries.report)
    assert ("refused" in seen) != own
