"""The training step: what moves, what does not, and that nothing is computed for nothing."""

from __future__ import annotations

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax.config.loader import TrainingConfig
from phi3_jax.evaluation.held_out import jit_eval_step
from phi3_jax.evaluation.loss import batch_loss
from phi3_jax.model.remat import SAVED
from phi3_jax.planning.costs import products
from phi3_jax.planning.parts import part_of, phase_of
from phi3_jax.training.optimizer import make_optimizer
from phi3_jax.training.remat import LADDER
from phi3_jax.training.step import (
    TrainState,
    jit_train_step,
    partition,
)

CONFIG = phi3_jax.Phi3Config(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.1,
)  # fmt: skip


def make(dropout: float = 0.0, remat="full", implementation: str = "xla", **settings):
    model = phi3_jax.Phi3(CONFIG, rngs=nnx.Rngs(0))
    model.set_attn_implementation(implementation)
    lora = lora_flax.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear"
    )
    lora_flax.wrap(model, lora, rngs=nnx.Rngs(1))
    graphdef, trainable, frozen = partition(model)
    training = TrainingConfig(
        output_dir="x", learning_rate=1e-2, lr_scheduler_type="constant", **settings
    )
    tx = make_optimizer(training, 100)
    state = TrainState(trainable, tx.init(trainable))
    return jit_train_step(graphdef, tx, remat), state, frozen, graphdef, tx


def make_batch(rows: int, length: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows `[rows, length]` of unequal lengths and unequal numbers of targets."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, length + 1, rows)[:, None]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    segment_ids = (positions < lengths).astype(np.int32)
    targets = (rng.random((rows, length)) < rng.random((rows, 1))) & (segment_ids == 1)
    targets[:, 0] = False
    targets[:, 1] = True
    return {
        "tokens": rng.integers(0, 97, (rows, length), dtype=np.int32) * segment_ids,
        "segment_ids": segment_ids,
        "positions": positions * segment_ids,
        "targets": targets,
    }


def stacked(batch, accumulation: int):
    return {k: v.reshape(accumulation, -1, v.shape[-1]) for k, v in batch.items()}


def copy(tree):
    """The step donates its state."""
    return jax.tree.map(jnp.copy, tree)


def test_micro_batches_equal_one_batch():
    """Unequal token counts included: sums are carried, not means."""
    step, state, frozen, *_ = make()
    batch = make_batch(8)
    results = [
        step(copy(state), frozen, stacked(batch, n), jnp.int32(0), jnp.uint32(0))
        for n in (1, 2, 4, 8)
    ]
    (one, first), *others = results
    for other, metrics in others:
        np.testing.assert_allclose(metrics.loss, first.loss, rtol=1e-6)
        np.testing.assert_allclose(metrics.grad_norm, first.grad_norm, rtol=1e-5)
        chex.assert_trees_all_close(other.trainable, one.trainable, rtol=1e-7, atol=1e-5)


def test_base_stays_bitwise_and_every_lora_leaf_moves():
    step, state, frozen, *_ = make(weight_decay=0.1)
    before = copy((state, frozen))
    for i in range(3):
        state, _ = step(state, frozen, stacked(make_batch(4, seed=i), 1), i, jnp.uint32(0))
    chex.assert_trees_all_equal(frozen, before[1])
    for path, after in nnx.to_flat_state(state.trainable):
        start = dict(nnx.to_flat_state(before[0].trainable))[path]
        moved = np.asarray(after[...] != start[...])
        assert moved.any(axis=(1, 2)).all(), f"{path}: some layer did not move"


def test_no_optimizer_slot_of_a_frozen_shape():
    _, state, frozen, *_ = make()
    frozen_shapes = {leaf.shape for leaf in jax.tree.leaves(frozen)}
    trainable_shapes = {leaf.shape for leaf in jax.tree.leaves(state.trainable)}
    slots = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} - {()}
    assert slots == trainable_shapes
    assert not slots & frozen_shapes


def test_no_weight_gradient_of_a_frozen_kernel_is_computed():
    """No product in the whole step has the shape of a frozen kernel, of one layer or of the stack.

    Merging would have it (A @ B), and so would a weight gradient (x^T dy).
    """
    step, state, frozen, graphdef, tx = make(remat="none")
    batch = stacked(make_batch(5), 1)  # 60 tokens: no size of a kernel
    jaxpr = step.trace(state, frozen, batch, jnp.int32(0), jnp.uint32(0)).jaxpr
    kernels = {leaf.shape[-2:] for leaf in jax.tree.leaves(frozen) if leaf.ndim >= 2}
    kernels |= {shape[::-1] for shape in kernels}
    products = [shape for shape in dot_shapes(jaxpr.jaxpr) if shape[-2:] in kernels]
    assert len(list(dot_shapes(jaxpr.jaxpr))) > 20
    assert not products


def dot_shapes(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from dot_shapes(inner)


def test_one_compilation_per_shape():
    step, state, frozen, *_ = make()
    for i in range(4):
        length = 12 if i % 2 else 16
        batch = stacked(make_batch(4, length=length, seed=i), 2)
        state, _ = step(state, frozen, batch, jnp.int32(i), jnp.uint32(0))
    assert step._cache_size() == 2


def test_remat_changes_nothing():
    """Loss, gradient, and the adapter after a step, for every policy and every named value."""
    results = []
    for remat in ("none", "dots", "offload", *LADDER, *((name,) for name in SAVED)):
        step, state, frozen, *_ = make(dropout=0.2, remat=remat)
        results.append(step(state, frozen, stacked(make_batch(4), 2), 3, jnp.uint32(5)))
    for after, metrics in results[1:]:
        np.testing.assert_allclose(metrics.loss, results[0][1].loss, rtol=1e-6)
        np.testing.assert_allclose(metrics.grad_norm, results[0][1].grad_norm, rtol=1e-5)
        chex.assert_trees_all_close(after.trainable, results[0][0].trainable, atol=1e-4)


@pytest.mark.parametrize(
    ("remat", "again"),
    [
        ("full", ["qkv_proj", "o_proj", "gate_up_proj", "attention"]),
        (("attention", "residual"), ["qkv_proj", "gate_up_proj"]),
        (("attention", "residual", "qkv"), ["gate_up_proj"]),
        (("attention", "residual", "gate_up"), ["qkv_proj"]),
        (SAVED, []),
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["xla", "splash_interpreted"])
def test_what_is_saved_is_not_computed_again(remat, again, implementation):
    """The matrix products in the recomputed part of the step, by the part they belong to."""
    step, state, frozen, *_ = make(remat=remat, implementation=implementation)
    length = 12 if implementation == "xla" else 128
    batch = stacked(make_batch(2, length=length), 1)
    jaxpr = step.trace(state, frozen, batch, jnp.int32(0), jnp.uint32(0)).jaxpr
    found = {
        part_of(product.scope)
        for product in products(jaxpr)
        if product.flops and phase_of(product.scope) == "recomputed"
    }
    assert (found - {"LoRA"} if again else found) == set(again)


def test_dropout_is_a_function_of_seed_and_step():
    step, state, frozen, *_ = make(dropout=0.5)
    # B is zero at the start and hides the dropout of A's input from the loss.
    state = state._replace(trainable=jax.tree.map(lambda leaf: leaf + 0.1, state.trainable))
    batch = stacked(make_batch(4), 2)

    def loss(number, seed):
        return float(step(copy(state), frozen, batch, jnp.int32(number), jnp.uint32(seed))[1].loss)

    assert loss(3, 7) == loss(3, 7)
    assert len({loss(3, 7), loss(4, 7), loss(3, 8)}) == 3


def test_evaluation_has_no_dropout():
    step, state, frozen, graphdef, _ = make(dropout=0.5)
    batch = make_batch(4)
    sums = jit_eval_step(graphdef)(state.trainable, frozen, batch)
    again = jit_eval_step(graphdef)(state.trainable, frozen, batch)
    assert sums == again
    with_key = batch_loss(
        graphdef,
        jax.tree.map(lambda leaf: leaf + 0.1, state.trainable),
        frozen,
        batch,
        jax.random.key(0),
        "none",
    )
    assert with_key.nll != sums.nll
    assert sums.targets == batch["targets"].sum()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_step_changes_nothing(value):
    step, state, frozen, *_ = make()
    batch = stacked(make_batch(4), 1)
    state, metrics = step(state, frozen, batch, jnp.int32(0), jnp.uint32(0))
    assert metrics.finite
    before = copy(state)
    poisoned = copy(frozen)
    norm = poisoned["model"]["norm"]["weight"]
    norm.set_value(norm[...].at[0].set(value))
    after, metrics = step(state, poisoned, batch, jnp.int32(1), jnp.uint32(0))
    assert not metrics.finite
    chex.assert_trees_all_equal(after, before)


def test_an_overflowing_update_is_not_taken():
    """Finite loss and gradients, times a rate that nothing survives."""
    _, state, frozen, graphdef, _ = make()
    step = jit_train_step(graphdef, optax.sgd(np.inf), "full")
    state = TrainState(state.trainable, optax.sgd(np.inf).init(state.trainable))
    before = copy(state)
    batch = stacked(make_batch(4), 1)
    after, metrics = step(state, frozen, batch, jnp.int32(0), jnp.uint32(0))
    assert np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm)
    assert not metrics.finite
    chex.assert_trees_all_equal(after, before)


def test_mask_and_split_give_the_same_update_with_clipping():
    """Clipping uses the norm of the trainable gradients only."""
    step, state, frozen, graphdef, tx = make(max_grad_norm=0.05)
    batch = stacked(make_batch(4), 1)
    model = nnx.merge(graphdef, state.trainable, frozen)
    everything_def, params = nnx.split(model)
    masked = lora_flax.mask_optimizer(tx, lora_flax.trainable_mask(params))

    def loss(params):
        model = nnx.merge(everything_def, params)
        whole_def, trainable, frozen = partition(model)
        micro = {k: v[0] for k, v in batch.items()}
        sums = batch_loss(whole_def, trainable, frozen, micro, None, "none")
        return sums.objective / sums.targets

    updates, _ = masked.update(jax.grad(loss)(params), masked.init(params), params)
    moved = nnx.merge(everything_def, optax.apply_updates(params, updates))
    _, expected, base = partition(moved)
    after, metrics = step(copy(state), frozen, batch, jnp.int32(0), jnp.uint32(0))
    assert metrics.grad_norm > 0.05
    chex.assert_trees_all_equal(base, frozen)
    chex.assert_trees_all_close(after.trainable, expected, rtol=1e-7, atol=1e-6)
