"""Settings for a run by its data, its device, and the literature, each with its reason."""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import nnx

import lora_flax
from phi3_jax.advice.lengths import LengthAdvice, filling, length_advice
from phi3_jax.advice.literature import LARGE_BATCH, NEAR, rank_for, rate_range, rounded, shown
from phi3_jax.advice.start import WASTEFUL, adapts_mlp
from phi3_jax.checkpoint.abstract import abstract_model
from phi3_jax.checkpoint.hub import resolve
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.loading import load_data
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.model.config import Phi3Config
from phi3_jax.planning.report import read_base
from phi3_jax.quickstart import local_paths
from phi3_jax.training.optimizer import total_steps

FEWEST_STEPS = 100  # below, LoRA Without Regret finds its best rates still rising
FEW = 0.05  # rows of which the end may be cut


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """One line of advice.

    Attributes:
        reason: what to set, and why.
        overrides: what to change of the config, as on the command line; none if it is fine.
    """

    reason: str
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the advice rests on.

    Attributes:
        network: the base model's config.
        adapter: what would be wrapped.
        learned: learned tokens of the data, each once.
        lengths: where to cut the rows.
        cut: share of the rows that the config's `max_length` cuts.
        padding, packed: shares of padding positions, now and with `data.packing` (None if on).
        rows: rows of a step on one device.
        steps: steps of the run.
    """

    network: Phi3Config
    adapter: lora_flax.Report
    learned: int
    lengths: LengthAdvice
    cut: float
    padding: float
    packed: float | None
    rows: int
    steps: int


def read_facts(config: RunConfig) -> Facts:
    """Tokenize the data and wrap the network's shapes; no weights are read.

    Raises:
        UserError: data or model not found.
        lora_flax.LoraError: a target matches no layer.
    """
    local = local_paths(config)
    _, network = read_base(None, config)
    directory = resolve(local.model.path, local.model.revision, weights=False)
    tokenizer = load_tokenizer(directory, local.data.chat_template_path)
    train, _ = load_data(local.data, tokenizer)
    batches = BatchPlan.from_config(local.data, local.training).train_batches(
        train.examples, local.training.seed
    )
    rows = batches.batch_size * batches.accumulation
    steps = total_steps(config.training, batches.steps_per_epoch)
    learned = train.report.target_tokens
    if train.stream is not None:  # these are its first rows; the run reads this many
        learned = learned * rows * steps // train.report.examples
    filled = filling(batches)
    whole = train.examples.source.lengths[np.unique(train.examples.rows)]
    return Facts(
        network=network,
        adapter=adapter_report(network, config.peft.to_lora()),
        learned=learned,
        lengths=length_advice(
            whole, config.data.pad_to_multiple_of, network.max_position_embeddings
        ),
        cut=train.report.cut / max(train.report.examples, 1),
        padding=filled.padding,
        packed=filled.packed,
        rows=rows,
        steps=steps,
    )


def adapter_report(network: Phi3Config, lora: lora_flax.LoraConfig) -> lora_flax.Report:
    """What an adapter would have on a network, from shapes alone."""
    plain = dataclasses.replace(lora, init_lora_weights=True)
    reports: list[lora_flax.Report] = []

    def wrap(model: nnx.Module) -> nnx.Module:
        reports.append(lora_flax.wrap(model, plain, rngs=nnx.Rngs(0)))
        return model

    nnx.eval_shape(wrap, abstract_model(network, "float32"))
    return reports[0]


def suggest(config: RunConfig, facts: Facts) -> list[Suggestion]:
    """Learning rate, rank, layers, length and batch; see `memory` for what fits."""
    lora = config.peft.to_lora()
    return [
        _rate(config.training.learning_rate, facts, lora),
        _rank(facts, lora),
        _length(config, facts),
        _packing(config, facts),
        _batch(config, facts),
    ]


def _rate(rate: float, facts: Facts, lora: lora_flax.LoraConfig) -> Suggestion:
    usual = rate_range(facts.network.hidden_size, lora)
    ratio, start = usual.ratio(rate), rounded(usual.likely)
    where = (
        f"LoRA papers use {shown(usual.low)} to {shown(usual.high)} with AdamW at lora_alpha "
        f"{lora.lora_alpha:g}, whatever the rank, about ten times the rates of full fine-tuning; "
        f"the formula of LoRA Without Regret gives {shown(start)} for this width "
        "(doi:10.64434/tml.20250929, arXiv:2405.09673, arXiv:2305.14314)"
    )
    if 1 / NEAR <= ratio <= NEAR:
        return Suggestion(f"learning rate {shown(rate)}: {where}")
    side = "low" if ratio < 1 else "high"
    return Suggestion(
        f"learning rate {shown(start)} for {shown(rate)}, which is far too {side}: {where}",
        (f"training.learning_rate={start:g}",),
    )


def _rank(facts: Facts, lora: lora_flax.LoraConfig) -> Suggestion:
    trainable, r = facts.adapter.trainable, lora.r
    has = f"{trainable:,} trainable parameters for {facts.learned:,} learned tokens"
    overrides: tuple[str, ...] = ()
    if (rank := rank_for(facts.learned, trainable, r)) > r:
        overrides = (f"peft.r={rank}",)
        text = (
            f"rank {rank} for {r}: r={r} has {has}, and below one per token a low rank falls "
            "behind late in the run (two bits per parameter, arXiv:2404.05405; LoRA Without Regret)"
        )
    else:
        text = f"rank {r} is enough: {has} (two bits per parameter, arXiv:2404.05405)"
    if not adapts_mlp([layer.name for layer in facts.adapter.layers]):
        overrides += ("peft.target_modules=all-linear",)
        text += "; all layers: attention alone does worse at any rank (LoRA Without Regret)"
    return Suggestion(text, overrides)


def _length(config: RunConfig, facts: Facts) -> Suggestion:
    advice, now = facts.lengths, config.data.max_length
    shares = ", ".join(
        f"{'longest' if share == 100 else f'{share}%'} {tokens:,}"
        for share, tokens in advice.percentiles.items()
    )
    found = f"tokens of the rows: {shares}"
    if config.data.packing and config.data.packing_strategy != "bfd":
        return Suggestion(f"length {now}: longer rows are split, and nothing is lost; {found}")
    cuts = f"{now}, which cuts {facts.cut:.1%} of the rows"
    if facts.cut <= FEW or now >= advice.max_length:
        return Suggestion(f"length {cuts}; {found}")
    return Suggestion(
        f"length {advice.max_length} for {cuts}; {found}",
        (f"data.max_length={advice.max_length}",),
    )


def _packing(config: RunConfig, facts: Facts) -> Suggestion:
    if facts.packed is None:
        return Suggestion(f"packing: {facts.padding:.0%} of the positions are padding")
    text = f"{facts.padding:.0%} of the positions are padding, {facts.packed:.0%} with data.packing"
    if facts.padding - facts.packed > WASTEFUL:
        # Not a change of the config: a step then has other rows, and the rate to go with them.
        text += "; consider it: each step then has more examples in the same memory"
    return Suggestion(f"no packing: {text}")


def _batch(config: RunConfig, facts: Facts) -> Suggestion:
    rows = facts.rows
    text = f"{facts.steps:,} steps of {rows} rows"
    wanted = min(rows, LARGE_BATCH)
    if config.training.max_steps <= 0 and facts.steps < FEWEST_STEPS:
        # The same epochs in smaller steps.
        wanted = max(1, min(wanted, rows * facts.steps // FEWEST_STEPS))
    if wanted == rows:
        return Suggestion(
            f"batch: {text}; LoRA does best with up to about {LARGE_BATCH} rows (LoRA Without "
            "Regret, and TRL's guide to it)"
        )
    why = (
        f"LoRA loses more to more than {LARGE_BATCH} rows than full fine-tuning does, whatever the "
        "rank (LoRA Without Regret)"
        if rows > LARGE_BATCH
        else f"fewer than {FEWEST_STEPS} steps are a short run, whose loss is still falling"
    )
    return Suggestion(f"batch: {wanted} rows for {text}; {why}", tuple(batch_keys(wanted, wanted)))


def batch_keys(rows: int, fitting: int) -> list[str]:
    """Overrides for steps of that many rows, at most `fitting` of which a device takes at once."""
    each = max(n for n in range(1, min(rows, fitting) + 1) if rows % n == 0)
    return [
        f"training.per_device_train_batch_size={each}",
        f"training.gradient_accumulation_steps={rows // each}",
    ]
