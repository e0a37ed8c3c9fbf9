"""Rates and ranks of the literature, as its formulas and tables have them."""

from __future__ import annotations

import pytest

from lora_flax import LoraConfig
from phi3_jax.advice.literature import rank_for, rate_range, rounded
from phi3_jax.advice.start import rate_line
from phi3_jax.config.loader import load_config
from phi3_jax.config.shipped import shipped_names


def lora(r: int = 16, alpha: float = 32, **settings) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", **settings)


def test_the_formula_of_lora_without_regret():
    """tinker-cookbook's `get_lr`: 5e-5 * 10 * (2000 / hidden) ** p."""
    llama, qwen = 5e-4 * (2000 / 3072) ** 0.781, 5e-4 * (2000 / 3072) ** 0.0775
    found = rate_range(3072, lora())
    assert found.likely == pytest.approx((llama * qwen) ** 0.5)
    assert (found.low, found.high) == (1e-4, 5e-4)
    narrow = rate_range(1024, lora())
    assert narrow.high == pytest.approx(5e-4 * (2000 / 1024) ** 0.781)
    assert rate_range(576, lora()) == narrow  # not fitted to narrower ones


def test_the_rate_depends_on_alpha_and_not_on_the_rank():
    assert rate_range(3072, lora(r=4)) == rate_range(3072, lora(r=256))
    assert rate_range(3072, lora(alpha=16)).low == 2e-4
    # alpha / sqrt(r) is (alpha * sqrt(r)) / r.
    assert rate_range(3072, lora(16, 8, use_rslora=True)) == rate_range(3072, lora())


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (5e-6, "warning: learning rate 5e-6 is 20 times below"),
        (2e-5, "warning: learning rate 2e-5 is 5 times below"),
        (5e-5, "learning rate: 5e-5 is 2 times below"),
        (2e-4, "learning rate: 2e-4 is within"),
        (1e-3, "learning rate: 1e-3 is 2 times above"),
        (1e-2, "warning: learning rate 1e-2 is 20 times above"),
        (0.0, "warning: learning rate 0 is inf times below"),
    ],
)
def test_far_from_the_usual_rates(rate, expected):
    assert rate_line(rate, 3072, lora()).startswith(expected)


def test_only_the_guides_own_rates_are_far():
    """Microsoft's 5e-6 for LoRA is; the configs of this project are not."""
    far = set()
    for name in shipped_names():
        config = load_config(name)
        if rate_line(config.training.learning_rate, 3072, config.peft.to_lora())[0] == "w":
            far.add(name)
    assert far == {"guide_qlora_notebook", "guide_sample_finetune"}


@pytest.mark.parametrize(
    ("learned", "expected"), [(0, 1), (1_000, 1), (100_000, 16), (101_000, 32), (10**9, 256)]
)
def test_a_parameter_for_each_learned_token(learned, expected):
    assert rank_for(learned, trainable=100_000, r=16) == expected


def test_one_digit():
    assert rounded(0.000412) == 4e-4
