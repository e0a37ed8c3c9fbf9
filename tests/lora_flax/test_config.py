import math

import pytest

from lora_flax import LoraConfig, LoraError, expressions


def test_scaling_is_that_of_peft():
    assert LoraConfig(r=16, lora_alpha=32).scaling == 2.0
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scaling == 32 / math.sqrt(16)


def test_defaults_are_pefts():
    peft = pytest.importorskip("peft").LoraConfig()
    ours = LoraConfig()
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias"):
        assert getattr(ours, name) == getattr(peft, name)


def test_is_static_data():
    a = LoraConfig(target_modules=["b", "a", "b"])
    b = LoraConfig(target_modules={"a", "b"})
    assert a == b and hash(a) == hash(b)


def test_starts_that_a_later_call_sets():
    deferred = {"eva", "loftq", "qera"}
    for start in (
        True,
        False,
        "gaussian",
        "orthogonal",
        "pissa",
        "pissa_niter_4",
        "olora",
        *deferred,
    ):
        assert LoraConfig(init_lora_weights=start).init_is_deferred == (start in deferred)


def test_every_bad_field_is_named_at_once():
    with pytest.raises(LoraError) as error:
        LoraConfig(
            r=0, lora_alpha=-1, lora_dropout=1.0, target_modules=[], use_rslora="yes", bias="some"
        )
    for name in ("r ", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    "odd",
    [
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"a": 10**400}},
        {"rank_pattern": {"(?i)a": 4}},  # inside PEFT's expression the flag is not at the start
        {"modules_to_save": ["(?i)lm_head"]},
        {"modules_to_save": ["a(b"]},
        {"exclude_modules": "("},
        {"exclude_modules": "(.+)+x"},  # twice as long with every letter
        {"alpha_pattern": {r"(\w+\.?)+x": 4}},
        {"layers_pattern": ["(?i)layers"], "layers_to_transform": [0]},
    ],
    ids=lambda odd: str(odd)[:30],
)
def test_expressions_and_numbers_that_fail_where_they_are_used(odd, monkeypatch):
    monkeypatch.setattr(expressions, "TIME_LIMIT", 0.2)
    with pytest.raises(LoraError, match="not a regular expression|numbers? above 0"):
        LoraConfig(target_modules=["q_proj"], **odd)


def test_long_lists_of_problems_are_cut():
    with pytest.raises(LoraError, match="and 40 more$"):
        LoraConfig(target_modules=["q_proj"], rank_pattern={str(n): 0 for n in range(50)})
