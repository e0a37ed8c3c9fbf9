"""The choice of what the backward pass keeps: the cheapest that fits, never a reason to stop."""

from __future__ import annotations

import functools

import pytest

from phi3_jax import Phi3Config, platform
from phi3_jax.config.loader import TrainingConfig
from phi3_jax.training.identity import differences
from phi3_jax.training.remat import LADDER, activation_bytes, choose, from_text, to_text
from tests.conftest import ROOT

MINI = Phi3Config.from_file(
    ROOT / "tests" / "fixtures" / "checkpoints" / "Phi-3-mini-4k-instruct.json"
)
TOKENS, BF16 = 4096, 2
SIZES = {remat: activation_bytes(MINI, TOKENS, BF16, remat) for remat in LADDER}


def test_less_is_kept_further_down_the_ladder():
    assert sorted(SIZES.values(), reverse=True) == list(SIZES.values())
    # A token of a layer: gate and up, 2 bytes each.
    difference = SIZES[LADDER[0]] - SIZES[LADDER[2]]
    assert difference == TOKENS * 32 * 2 * 8192 * BF16
    # What the compiler for a v5e and a v5p needed beside weights, adapter, and optimizer.
    assert 7.16 < SIZES[LADDER[1]] / 2**30 < 7.6 and 9.97 < SIZES[LADDER[0]] / 2**30 < 10.6


def test_rows_that_are_cut_over_devices():
    """They share the 32 key/value heads; of `tensor` 4 each has 8, which 16 devices cannot."""
    tokens, full = 16 * TOKENS, functools.partial(activation_bytes, MINI, remat="full")
    one = full(tokens=TOKENS, itemsize=BF16)
    shared = full(tokens=tokens, itemsize=BF16, devices=16) - one
    gathered = full(tokens=tokens, itemsize=BF16, devices=16, tensor=4) - one
    assert shared == 4 * TOKENS * BF16 * (3072 + 3072)
    assert gathered == 4 * tokens * BF16 * 3072


@pytest.mark.parametrize("remat", LADDER, ids=to_text)
def test_the_cheapest_that_fits(remat):
    found, line = choose(MINI, TOKENS, BF16, SIZES[remat])
    assert found == remat
    assert f"{SIZES[remat] / 2**30:.1f} GiB of activations" in line
    assert from_text(to_text(remat)) == remat


@pytest.mark.parametrize("free", [0, None])
def test_nothing_is_kept_if_nothing_fits_or_nobody_knows(free):
    assert choose(MINI, TOKENS, BF16, free)[0] == "full"


def test_an_earlier_choice_is_taken_where_it_fits():
    kept = ("attention", "residual")
    found, line = choose(MINI, TOKENS, BF16, 2**40, to_text(kept))
    assert found == kept and "before" not in line
    found, line = choose(MINI, TOKENS, BF16, SIZES["full"], to_text(kept))
    assert found == "full" and "attention+residual, as before, does not fit; now full" in line
    assert choose(MINI, TOKENS, BF16, 2**40, "something newer")[0] == LADDER[0]


def test_the_free_memory_of_this_machine(monkeypatch, tmp_path):
    assert 2**20 < platform.free_memory() < 2**50
    monkeypatch.setattr(platform, "_cgroup_memory", lambda: 16 * 2**20)
    assert platform.free_memory() == 2**20  # half of it, for eight devices
    monkeypatch.setattr(platform, "_cgroup_memory", lambda: None)
    monkeypatch.setattr(platform, "_available_memory", lambda: None)
    assert platform.free_memory() is None
    assert 2**20 < platform.host_memory() < 2**50
    monkeypatch.setattr(platform, "_cgroup", {"memory.max": 2**20}.get)
    assert platform.host_memory() == 2**20


@pytest.mark.parametrize(
    ("settings", "remat"),
    [
        ({}, "auto"),
        ({"gradient_checkpointing": False}, "none"),
        ({"gradient_checkpointing": True}, "full"),
        ({"gradient_checkpointing": True, "remat_policy": "dots"}, "dots"),
        ({"gradient_checkpointing": True, "remat_policy": ["qkv"]}, ("qkv",)),
    ],
)
def test_the_config(settings, remat):
    assert TrainingConfig(output_dir="x", **settings).remat == remat


def test_another_choice_does_not_refuse_a_checkpoint():
    now = {
        "base": "b", "data": "d", "held_out": None, "chooses_best": False, "rows": [1, 1, 1],
        "asked": {"remat": "auto"}, "choices": {"remat": "full"}, "planned": 3, "extend": None,
        "settings": {"training.seed": 1},
    }  # fmt: skip
    settings = {"training.seed": 1, "training.gradient_checkpointing": True}
    saved = now | {"choices": {"remat": "attention"}, "settings": settings, "step": 1}
    assert differences(saved, now) == []
    assert differences(saved | {"settings": {"training.seed": 2}}, now)
