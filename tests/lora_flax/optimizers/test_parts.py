"""A stack is updated as its layers would be one by one; optax alone does otherwise."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import lora_flax
from tests.lora_flax.nets import Listed
from tests.lora_flax.optimizers.separate import one_by_one, random_like, wrapped_stack

FACTORED = {"min_dim_size_to_factor": 1}


@pytest.mark.parametrize(
    "tx",
    [optax.scale_by_factored_rms(**FACTORED), optax.contrib.scale_by_muon()],
    ids=["adafactor", "muon"],
)
def test_equals_separate_arrays(tx):
    model, trainable = wrapped_stack()
    ours = lora_flax.per_part(tx, lora_flax.array_parts(model))
    separate = one_by_one(trainable)
    state, theirs = ours.init(trainable), {name: tx.init(a) for name, a in separate.items()}
    for seed in range(3):
        grads = random_like(trainable, seed)
        updates, state = jax.jit(ours.update)(grads, state, trainable)
        found = one_by_one(updates)
        for name, grad in one_by_one(grads).items():
            expected, theirs[name] = tx.update(grad, theirs[name], separate[name])
            np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=2e-5, err_msg=name)


def test_optax_alone_mixes_the_layers():
    """With more layers than ranks, its factored moments are of another matrix."""
    tx = optax.scale_by_factored_rms(**FACTORED)
    grads = {"lora_A": np.random.default_rng(0).normal(size=(8, 6, 2)).astype(np.float32)}
    ours = lora_flax.per_part(tx, {("lora_A",): lora_flax.Parts(1, (2,))})
    apart = ours.update(grads, ours.init(grads), grads)[0]["lora_A"]
    mixed = tx.update(grads, tx.init(grads), grads)[0]["lora_A"]
    alone = tx.update(grads["lora_A"][3], tx.init(grads["lora_A"][3]), grads["lora_A"][3])[0]
    np.testing.assert_allclose(apart[3], alone, rtol=1e-6)
    assert np.abs(mixed - apart).max() > 0.1


@pytest.mark.parametrize("extra", ["use_dora", "lora_bias"])
def test_padding_does_not_count(extra):
    def update(updates, state, params=None, *, size):
        return jax.tree.map(lambda u: u * 0 + size.prod(), updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    model, trainable = wrapped_stack(**{extra: True})
    ours = lora_flax.per_part(tx, lora_flax.array_parts(model))
    counts, _ = ours.update(trainable, ours.init(trainable), trainable)
    for name, count in one_by_one(counts).items():
        assert np.all(count == count.size), name


def test_every_array_of_a_model_is_known():
    """Also modules that train in full, biases, and the members of a list; they have one part."""
    model = Listed(nnx.Rngs(0))
    config = lora_flax.LoraConfig(
        r=2, target_modules=["proj"], modules_to_save=["head"], bias="all", use_dora=True
    )
    lora_flax.wrap(model, config, rngs=nnx.Rngs(0))
    parts = lora_flax.array_parts(model)
    trainable = nnx.state(model, lora_flax.mark_only_lora_as_trainable(model))
    flat = nnx.to_flat_state(trainable)
    assert parts.keys() == {path for path, _ in flat}
    for path, variable in flat:
        assert parts[path].stack == 0 and sum(parts[path].columns) == variable.shape[-1]
    tx = lora_flax.per_part(optax.scale(2.0), parts)
    updates, _ = tx.update(trainable, tx.init(trainable))
    for ours, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(trainable), strict=True):
        np.testing.assert_array_equal(ours, 2 * leaf)
