"""What published work says about LoRA's learning rate, rank, layers and batch size.

Sources:

- LoRA Without Regret: Schulman and Thinking Machines Lab, 2025, doi:10.64434/tml.20250929. The best
  rate is about ten times that of full fine-tuning (fifteen times for runs of about 100 steps) and
  nearly independent of the rank, with the scale `lora_alpha / r` and `lora_alpha` 32; LoRA loses
  more than full fine-tuning to large batches, whatever its rank; attention alone does worse than
  the MLP layers or all of them. Its rates for Llama and Qwen, as tinker-cookbook's
  `hyperparam_utils.get_lr` computes them: 5e-5 x 10 x (2000 / hidden size) ** p, with p = 0.781
  (Llama) and 0.0775 (Qwen). TRL's guide to it (docs/source/lora_without_regret.md) puts the batch
  below 32 rows.
- LoRA Learns Less and Forgets Less: Biderman et al., 2024, arXiv:2405.09673. Best rates of LoRA
  between 1e-4 and 5e-4, an order of magnitude above those of full fine-tuning; all layers, and
  `lora_alpha` twice the rank.
- QLoRA: Dettmers et al., 2023, arXiv:2305.14314. 2e-4 for 7B and 13B, 1e-4 for 33B and 65B.
- Physics of Language Models, part 3.3: Allen-Zhu and Li, 2024, arXiv:2404.05405. A network stores
  about two bits of knowledge per parameter.
"""

from __future__ import annotations

import dataclasses
import math

from lora_flax import LoraConfig

# The alpha that the rates of LoRA Without Regret belong to, with the scale alpha / r.
ALPHA = 32
# What LoRA papers use whatever the model (QLoRA for large ones, Biderman et al. for the best).
LOWEST, HIGHEST = 1e-4, 5e-4
_FULL_RATE, _FACTOR, _WIDTH = 5e-5, 10, 2000
_NARROWEST = 1024  # of the networks that the exponents were fitted to
_EXPONENTS = {"Qwen": 0.0775, "Llama": 0.781}
# In LoRA Without Regret, the loss rises slowly within a factor of about three of the best rate.
NEAR = 3
LARGE_BATCH = 32
# Two bits per parameter, and up to two bits per learned token: a loss of 1.4 nats, as in chats.
TOKENS_PER_PARAMETER = 1
LARGEST_RANK = 256


@dataclasses.dataclass(frozen=True)
class RateRange:
    """Learning rates of AdamW from the literature for one adapter.

    Attributes:
        low, high: ends of the usual range.
        likely: the geometric mean of the formula's rates for Llama and Qwen at this width.
    """

    low: float
    high: float
    likely: float

    def ratio(self, rate: float) -> float:
        """How far a rate is outside the range, as a factor: below 1, 1 inside, or above 1."""
        return rate / min(max(rate, self.low), self.high)


def rate_range(hidden_size: int, lora: LoraConfig) -> RateRange:
    """The usual learning rates for a network of this width and an adapter with this alpha.

    With Adam, the size of an update goes with the product of the rate and `lora_alpha`, at equal
    rank (LoRA Without Regret, "Parametrization and hyperparameters"), so that half the alpha takes
    twice the rate.
    """
    width = max(hidden_size, _NARROWEST)
    of_width = [_FULL_RATE * _FACTOR * (_WIDTH / width) ** power for power in _EXPONENTS.values()]
    factor = ALPHA / alpha_over_r(lora)
    return RateRange(
        low=factor * min(LOWEST, *of_width),
        high=factor * max(HIGHEST, *of_width),
        likely=factor * math.prod(of_width) ** (1 / len(of_width)),
    )


def alpha_over_r(lora: LoraConfig) -> float:
    """The alpha that gives the same update with the scale `lora_alpha / r`."""
    return lora.lora_alpha * (math.sqrt(lora.r) if lora.use_rslora else 1)


def rank_for(learned: int, trainable: int, r: int) -> int:
    """The smallest power of two at which an adapter has the capacity for the learned tokens.

    Args:
        learned: learned tokens of the data, each counted once.
        trainable: parameters of the adapter at rank `r`.
        r: its rank.

    Returns:
        At most `LARGEST_RANK`, the largest that LoRA Without Regret needed.
    """
    needed = learned / TOKENS_PER_PARAMETER / trainable * r
    return min(1 << math.ceil(math.log2(max(needed, 1))), LARGEST_RANK)


def rounded(rate: float) -> float:
    """A rate with one significant digit."""
    return float(f"{rate:.0e}")


def shown(rate: float) -> str:
    """A rate as configs have it: `2e-4`, `1.3e-3`."""
    if not 0 < rate < 0.1:
        return f"{rate:g}"
    digits, _, power = f"{rate:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
