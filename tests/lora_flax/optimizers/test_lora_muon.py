"""LoRA-Muon against the paper's formula in float64, with an SVD and an eigendecomposition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_flax
from lora_flax.optimizers.lora_muon import DAMPING
from tests.lora_flax.optimizers.separate import one_by_one, random_like, wrapped_stack


def msign(matrix):
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def root(gram):
    norm = np.linalg.norm(gram)
    values, vectors = np.linalg.eigh(gram / norm + DAMPING * np.eye(len(gram)))
    return vectors / np.sqrt(values * norm) @ vectors.T


def paper(a, b, m_a, m_b, rate, decay):
    """One step of the paper's A [m, r] and B [n, r], where W = A B^T; here B is transposed."""
    b, m_b = b.T, m_b.T
    r_a, r_b = root(a.T @ a), root(b.T @ b)
    keep = np.sqrt(1 - decay * rate)
    new_a = keep * a - rate / 2 * msign(m_a @ r_b) @ r_b / keep
    new_b = keep * b - rate / 2 * msign(m_b @ r_a) @ r_a / keep
    return new_a, new_b.T


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_equals_the_paper(decay):
    model, trainable = wrapped_stack()
    rates = [0.1, 0.05]
    tx = lora_flax.lora_muon(
        lambda step: jnp.asarray(rates)[step], lora_flax.array_parts(model), 0.8, decay
    )
    state = tx.init(trainable)
    expected = {name: array.astype(np.float64) for name, array in one_by_one(trainable).items()}
    momenta = dict.fromkeys(expected, 0.0)
    for step, rate in enumerate(rates):
        grads = random_like(trainable, step)
        updates, state = jax.jit(tx.update)(grads, state, trainable)
        trainable = jax.tree.map(jnp.add, trainable, updates)
        for name, grad in one_by_one(grads).items():
            momenta[name] = 0.8 * momenta[name] + 0.2 * grad.astype(np.float64)
        for name in [name for name in expected if name.endswith("lora_A")]:
            pair = (name, name.removesuffix("A") + "B")
            moved = paper(*(expected[n] for n in pair), *(momenta[n] for n in pair), rate, decay)
            expected |= dict(zip(pair, moved, strict=True))
        for name, array in one_by_one(trainable).items():
            # The iteration for msign ends within 0.2 % of 1.
            np.testing.assert_allclose(array, expected[name], rtol=5e-3, atol=2e-3, err_msg=name)
    assert state["count"] == 2


def test_where_b_is_zero_only_b_moves():
    """At the start of training, and with the padding of unequal ranks left at zero."""
    model, trainable = wrapped_stack()
    zero_b = jax.tree_util.tree_map_with_path(
        lambda path, a: a * 0 if lora_flax.param_label(path) == "lora_B" else a, trainable
    )
    grads = jax.tree_util.tree_map_with_path(
        lambda path, a: a * 0 if lora_flax.param_label(path) == "lora_A" else a,
        random_like(trainable, 0),
    )
    tx = lora_flax.lora_muon(0.1, lora_flax.array_parts(model))
    updates, state = tx.update(grads, tx.init(zero_b), zero_b)
    before = one_by_one(zero_b)
    for name, update in one_by_one(updates).items():
        assert np.isfinite(update).all()
        assert np.any(update) == name.endswith("lora_B"), name
        if name.endswith("lora_B"):
            product = before[name.removesuffix("B") + "A"] @ update
            assert np.linalg.norm(product, 2) == pytest.approx(0.05, rel=2e-2), name
    # The next step moves A by no more than the product allows.
    moved = jax.tree.map(jnp.add, zero_b, updates)
    updates, _ = tx.update(random_like(trainable, 1), state, moved)
    for name, update in one_by_one(updates).items():
        if name.endswith("lora_A"):
            product = update @ one_by_one(moved)[name.removesuffix("A") + "B"]
            assert np.linalg.norm(product, 2) < 0.052, name


def test_the_step_of_the_product_does_not_depend_on_the_factors():
    model, trainable = wrapped_stack()
    grads = random_like(trainable, 0)
    tx = lora_flax.lora_muon(0.1, lora_flax.array_parts(model))

    def step(c):
        def scaled(by_a):
            return lambda path, x: (
                x * (by_a if lora_flax.param_label(path) == "lora_A" else 1 / by_a)
            )

        values = jax.tree_util.tree_map_with_path(scaled(c), trainable)
        own = jax.tree_util.tree_map_with_path(scaled(1 / c), grads)
        updates, _ = tx.update(own, tx.init(values), values)
        before, after = one_by_one(values), one_by_one(updates)
        return {
            name: array @ before[other] + before[name] @ after[other]
            for name, array in after.items()
            if name.endswith("A") and (other := name.removesuffix("A") + "B")
        }

    one, five = step(1.0), step(5.0)
    for name, product in one.items():
        np.testing.assert_allclose(five[name], product, rtol=0, atol=1e-4, err_msg=name)
