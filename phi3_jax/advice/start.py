"""What is worth knowing about a run before it starts, in three lines.

The time a run will take is the fourth, as soon as a step was measured: see `clock`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import lora_flax
from phi3_jax.advice.clock import StepClock
from phi3_jax.advice.lengths import Filling, filling
from phi3_jax.advice.literature import LARGE_BATCH, NEAR, rank_for, rate_range, shown
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import Batches
from phi3_jax.data.report import DataReport

WASTEFUL = 0.2  # share of padding from which packing is worth a word


def look_ahead(
    config: RunConfig,
    hidden_size: int,
    adapter: lora_flax.Report,
    data: DataReport,
    batches: Batches,
) -> tuple[str, StepClock]:
    """The lines, and the clock that measures the steps.

    Args:
        config: the run's config.
        hidden_size: width of the network.
        adapter: what was wrapped.
        data: the report on the training rows.
        batches: the batches of the run.
    """
    lora, filled = config.peft.to_lora(), filling(batches)
    lines = [
        _capacity(adapter, data.target_tokens, lora.r),
        _data(data, filled, batches.batch_size * batches.accumulation),
    ]
    if config.training.optimizer == "adamw":  # the literature's rates are Adam's
        lines.insert(1, rate_line(config.training.learning_rate, hidden_size, lora))
    return "\n".join(lines), StepClock(filled.positions)


def clock_of(members: Iterable[Batches]) -> StepClock:
    """The clock of a sweep whose members have these batches."""
    return StepClock(sum(filling(batches).positions for batches in members))


def _capacity(adapter: lora_flax.Report, learned: int, r: int) -> str:
    line = (
        f"capacity: {adapter.trainable:,} trainable parameters for {learned:,} learned tokens, "
        f"{adapter.trainable / max(learned, 1):.2g} per token"
    )
    if (rank := rank_for(learned, adapter.trainable, r)) > r:
        line += (
            f"; below about 1, a low rank falls behind late in the run: try peft.r {rank} "
            "(LoRA Without Regret)"
        )
    if not adapts_mlp([layer.name for layer in adapter.layers]):
        line += (
            "; no MLP layer has an adapter, and attention alone does worse at any rank: "
            "peft.target_modules: all-linear (LoRA Without Regret)"
        )
    return line


def adapts_mlp(names: Sequence[str]) -> bool:
    """Whether any of these layers is one of the MLPs."""
    return any(".mlp." in f".{name}" for name in names)


def rate_line(rate: float, hidden_size: int, lora: lora_flax.LoraConfig) -> str:
    """How a learning rate compares with what the literature uses for this adapter and width."""
    usual = rate_range(hidden_size, lora)
    span = (
        f"{shown(usual.low)} to {shown(usual.high)} that LoRA papers use with AdamW at lora_alpha "
        f"{lora.lora_alpha:g}"
    )
    ratio = usual.ratio(rate)
    if ratio == 1:
        return f"learning rate: {shown(rate)} is within the {span}, whatever the rank"
    factor = f"{max(ratio, 1 / ratio) if ratio else float('inf'):.2g} times"
    side = "above" if ratio > 1 else "below"
    if 1 / NEAR <= ratio <= NEAR:
        return f"learning rate: {shown(rate)} is {factor} {side} the {span}"
    return (
        f"warning: learning rate {shown(rate)} is {factor} {side} the {span}, about ten times the "
        "rates of full fine-tuning (LoRA Without Regret); `phi3-jax suggest` helps to choose"
    )


def _data(data: DataReport, filled: Filling, rows: int) -> str:
    learned = data.target_tokens / max(data.tokens, 1)
    line = (
        f"batches: {learned:.0%} of the tokens are learned, {filled.padding:.0%} of the positions "
        "are padding"
    )
    if filled.packed is not None and filled.padding - filled.packed > WASTEFUL:
        line += f" (with data.packing: {filled.packed:.0%})"
    if rows > LARGE_BATCH:
        line += (
            f"; {rows} rows per step: LoRA loses more to batches above {LARGE_BATCH} rows than "
            "full fine-tuning, whatever the rank (LoRA Without Regret)"
        )
    return line
