"""Next-token cross-entropy that never holds the logits of a whole batch.

Logits `[B, S, V]` in float32 take 26 GiB at 8 x 4096 x 200k. Here the head runs on a few positions
per row at a time, only those whose next token is a target. The gradient (softmax minus one-hot,
backpropagated through the head) is computed in the same pass while the logits are in memory.
Nothing is computed twice, and only one array shaped like the hidden states is kept for the backward
pass.

Sums and counts are carried, never means: a step's loss is the mean over the target tokens of the
whole global batch, however it is split into micro-batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from phi3_jax.evaluation.logits import statistics
from phi3_jax.model.remat import Remat
from phi3_jax.model.sequence import parts_as_rows, shards
from phi3_jax.sharding.rules import gathered

# Logits held at once, in float32 values per device: 128 MiB.
LOGITS = 2**25

Head = Callable[..., jax.Array]
Batch = dict[str, jax.Array]


class LossSettings(NamedTuple):
    """The training objective and its chunking.

    Attributes:
        label_smoothing: the target gets probability `1 - label_smoothing`; the rest is spread over
            the whole vocabulary (Szegedy et al. 2016; HF's `LabelSmoother`).
        z_loss: weight of `log(Z) ** 2`, which keeps the logits from drifting (PaLM, 2022).
        chunk: positions, over all rows, whose logits are held at once; None derives it from
            `LOGITS`.
        devices: number of devices the tokens are spread over; each holds its own logits.
        loss_type: `nll`, or `dft`, which weighs each target's loss with its probability as a
            constant (Wu et al. 2025, arXiv:2508.05629; TRL's `loss_type`).
        neftune_noise_alpha: noise on the embeddings while dropout is on, see `neftune`.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int | None = None
    devices: int = 1
    loss_type: Literal["nll", "dft"] = "nll"
    neftune_noise_alpha: float = 0.0


class LossSums(NamedTuple):
    """Sums over target tokens, float32 scalars.

    Attributes:
        objective: what is minimized: `nll` with DFT's weights, label smoothing and the z-loss.
        nll: sum of -log p(target).
        correct: number of targets for which no other token is more probable.
        targets: number of targets.
    """

    objective: jax.Array
    nll: jax.Array
    correct: jax.Array
    targets: jax.Array


# The gradients of the hidden states and of the captured arrays, None for arrays without one.
Residuals = tuple[jax.Array, tuple[jax.Array | None, ...]]
# The sums and gradients of the chunks so far.
Carry = tuple[LossSums, jax.Array, list[jax.Array]]


def batch_loss(
    graphdef: nnx.GraphDef[Any],
    trainable: nnx.State[Any, Any],
    frozen: nnx.State[Any, Any],
    batch: Batch,
    key: jax.Array | None,
    remat: Remat,
    loss: LossSettings = LossSettings(),  # noqa: B008 (immutable)
) -> LossSums:
    """Loss sums of one micro-batch `[B, S]`; passing `key` enables dropout."""
    chex.assert_rank(batch["tokens"], 2)
    chex.assert_equal_shape(list(batch.values()))
    model = nnx.merge(graphdef, trainable, frozen)
    hidden = model.hidden_states(
        *(batch[name] for name in ("tokens", "positions", "segment_ids")),
        key=key,
        remat=remat,
        neftune_noise_alpha=loss.neftune_noise_alpha,
    )
    name = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    head = nnx.merge(graphdef, *(gathered(state, name) for state in (trainable, frozen))).head
    return next_token_loss(head, hidden, batch["tokens"], batch["targets"], loss)


@jax.named_scope("loss")
def next_token_loss(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    tokens: jax.Array,
    targets: jax.Array,
    settings: LossSettings = LossSettings(),  # noqa: B008 (immutable)
) -> LossSums:
    """Cross-entropy of each target token, predicted from the hidden state before it.

    Args:
        head: maps hidden states `[n, D]` to float32 logits `[n, V]`; may close over trainable
            arrays.
        hidden: `[B, S, D]`.
        tokens: int32 `[B, S]`.
        targets: bool `[B, S]`, the tokens to learn. Column 0 is never a target since nothing
            precedes it; the first token of a packed segment must not be one either.
        settings: the loss settings.

    Returns:
        Loss sums. Only `objective` is differentiable, with respect to the hidden states and
        whatever the head closes over.
    """
    chex.assert_rank([hidden, tokens, targets], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, tokens, targets], 2)
    if shards(*tokens.shape) == 1:
        hidden, labels, is_target = hidden[:, :-1], tokens[:, 1:], targets[:, 1:]
    else:
        hidden, labels, is_target = _cut_along_tokens(hidden, tokens, targets)
    rows, length, features = hidden.shape
    vocab = jax.eval_shape(head, hidden[0, :1]).shape[-1]
    width = chunk_width(rows, length, vocab, settings)
    example = jax.ShapeDtypeStruct((rows * width, features), hidden.dtype)
    pure_head, captured = jax.closure_convert(head, example)
    return _loss_sums(
        pure_head, settings._replace(chunk=width), hidden, labels, is_target, tuple(captured)
    )


def _cut_along_tokens(
    hidden: jax.Array, tokens: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, labels and targets with each device's part of a row as a row, `[C B, S / C]`.

    The next token of a part's last one is on another device, so labels are shifted before.
    """
    has_next = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
    labels, is_target = (jnp.roll(array, -1, axis=1) for array in (tokens, targets))
    return parts_as_rows(hidden), parts_as_rows(labels), parts_as_rows(is_target & has_next)


def chunk_width(rows: int, length: int, vocab: int, settings: LossSettings) -> int:
    """Positions per row, out of `length`, whose logits are held at once, at most."""
    positions = settings.chunk or max(16, LOGITS // vocab) * settings.devices
    most = max(1, min(positions // rows, length))
    # Equal chunks: a last one with few positions would cost as much as the others.
    chunks = max(1, -(-length // most))
    return -(-length // chunks)


def chunk_count(rows: int, length: int, vocab: int, settings: LossSettings, parts: int = 1) -> int:
    """Loss chunks for rows of `length` tokens in which all but the first are targets.

    `parts` is the number of devices that each row is cut over along its tokens.
    """
    targets = length - 1 if parts == 1 else length // parts
    return -(-targets // chunk_width(rows * parts, targets, vocab, settings))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_sums(
    head: Head,
    settings: LossSettings,
    hidden: jax.Array,
    labels: jax.Array,
    is_target: jax.Array,
    captured: tuple[jax.Array, ...],
) -> LossSums:
    """The sums only; here `settings.chunk` counts positions per row."""
    order, count = _targets_first(is_target)

    def add_chunk(index: jax.Array, sums: LossSums) -> LossSums:
        chunk, chunk_labels, weights, _ = _chunk(settings, index, order, hidden, labels, is_target)
        new = _chunk_loss(head, settings, chunk, chunk_labels, weights, captured)
        added: LossSums = jax.tree.map(jnp.add, sums, new)
        return added

    total: LossSums = jax.lax.fori_loop(0, _chunks(settings, count), add_chunk, _zero())
    return total


def _loss_sums_fwd(
    head: Head,
    settings: LossSettings,
    hidden_primal: CustomVJPPrimal,
    labels_primal: CustomVJPPrimal,
    is_target_primal: CustomVJPPrimal,
    captured: tuple[CustomVJPPrimal, ...],
) -> tuple[LossSums, Residuals]:
    """The sums and, in the same pass, the requested gradients of the objective."""
    # Frozen weights are captured too; compute gradients only for differentiated arrays.
    wanted = [i for i, primal in enumerate(captured) if primal.perturbed]
    hidden: jax.Array = hidden_primal.value
    labels: jax.Array = labels_primal.value
    is_target: jax.Array = is_target_primal.value
    values: list[jax.Array] = [primal.value for primal in captured]
    order, count = _targets_first(is_target)

    def objective(
        chunk: jax.Array, trained: list[jax.Array], chunk_labels: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, LossSums]:
        own = list(values)
        for i, value in zip(wanted, trained, strict=True):
            own[i] = value
        sums = _chunk_loss(head, settings, chunk, chunk_labels, weights, own)
        return sums.objective, sums

    def add_chunk(index: jax.Array, carry: Carry) -> Carry:
        sums, d_hidden, d_trained = carry
        chunk, chunk_labels, weights, where = _chunk(
            settings, index, order, hidden, labels, is_target
        )
        (d_chunk, d_own), new = jax.grad(objective, argnums=(0, 1), has_aux=True)(
            chunk, [values[i] for i in wanted], chunk_labels, weights
        )
        # No other chunk writes positions past a row's last target, and they are written as zero.
        d_hidden = jax.vmap(_set)(d_hidden, where, d_chunk)
        d_trained = jax.tree.map(jnp.add, d_trained, d_own)
        return jax.tree.map(jnp.add, sums, new), d_hidden, d_trained

    start: Carry = (_zero(), jnp.zeros_like(hidden), [jnp.zeros_like(values[i]) for i in wanted])
    sums, d_hidden, d_trained = jax.lax.fori_loop(0, _chunks(settings, count), add_chunk, start)
    d_captured: list[jax.Array | None] = [None] * len(values)
    for i, grad in zip(wanted, d_trained, strict=True):
        d_captured[i] = grad
    return sums, (d_hidden, tuple(d_captured))


def _loss_sums_bwd(
    head: Head, settings: LossSettings, residuals: Residuals, cotangents: LossSums
) -> tuple[jax.Array | None, None, None, tuple[jax.Array | None, ...]]:
    d_hidden, d_captured = residuals
    scale = cotangents.objective
    if isinstance(scale, SymbolicZero):
        scale = jnp.zeros((), jnp.float32)

    def scaled(grad: jax.Array | None) -> jax.Array | None:
        return None if grad is None else (grad * scale).astype(grad.dtype)

    return scaled(d_hidden), None, None, tuple(map(scaled, d_captured))


_loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd, symbolic_zeros=True)


def _targets_first(is_target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's positions with targets first, int32 `[B, S]`, and the target count per row."""
    return jnp.argsort(~is_target, axis=1, stable=True), is_target.sum(axis=1)


def _chunks(settings: LossSettings, count: jax.Array) -> jax.Array:
    assert settings.chunk is not None
    return -(-count.max() // settings.chunk)


def _chunk(
    settings: LossSettings,
    index: jax.Array,
    order: jax.Array,
    hidden: jax.Array,
    labels: jax.Array,
    is_target: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The next chunk of each row: hidden `[B, c, D]`, labels, weights and original positions.

    The row axis is kept, so rows spread over devices stay on their devices.
    """
    width = settings.chunk
    assert width is not None
    start = index * width
    # A last chunk that would overrun the end starts earlier; positions seen twice count once.
    begin = jnp.minimum(start, order.shape[1] - width)
    where = jax.lax.dynamic_slice_in_dim(order, begin, width, axis=1)  # [B, c]
    fresh = begin + jnp.arange(width) >= start
    weights = jnp.take_along_axis(is_target, where, axis=1) & fresh
    # Zero out non-targets: an inf there would turn into a nan in the head's gradient.
    chunk = jnp.take_along_axis(hidden, where[..., None], axis=1)
    chunk = jnp.where(weights[..., None], chunk, 0)
    where = jnp.where(fresh, where, hidden.shape[1])  # out of bounds: not written
    return chunk, jnp.take_along_axis(labels, where, axis=1, mode="clip"), weights, where


def _set(row: jax.Array, where: jax.Array, values: jax.Array) -> jax.Array:
    """One row `[S, D]` with the values `[c, D]` at some positions, except those past its end."""
    return row.at[where].set(values, mode="drop")


def _chunk_loss(
    head: Head,
    settings: LossSettings,
    chunk: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    captured: Sequence[jax.Array],
) -> LossSums:
    flat = chunk.reshape(-1, chunk.shape[-1])
    logits = head(flat, *captured)
    labels, weights = labels.reshape(-1), weights.reshape(-1)
    log_z, own, mean, top = statistics(logits, labels, bool(settings.label_smoothing))
    nll = log_z - own
    objective = nll
    if settings.loss_type == "dft":
        objective = nll * jax.lax.stop_gradient(jnp.exp(-nll))
    if settings.label_smoothing:
        spread = log_z - mean
        objective = (1 - settings.label_smoothing) * nll + settings.label_smoothing * spread
    if settings.z_loss:
        objective = objective + settings.z_loss * log_z**2
    correct = own >= top  # argmax would be a separate, slow pass on a CPU
    # where, not a product: a masked token must not contribute an inf or nan.
    return LossSums(
        jnp.where(weights, objective, 0.0).sum(),
        jnp.where(weights, nll, 0.0).sum(),
        (correct & weights).sum(dtype=jnp.float32),
        weights.sum(dtype=jnp.float32),
    )


def _zero() -> LossSums:
    return LossSums(*[jnp.zeros((), jnp.float32)] * 4)
