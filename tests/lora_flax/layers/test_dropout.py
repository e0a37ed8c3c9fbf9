"""Dropout: the statistics of the masks, and that they depend on key and place alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lora_flax.layers.dropout import dropout, random_bits

KEY = jax.random.key(0)
jitted = jax.jit(dropout, static_argnums=2)


def mask(key=KEY, shape=(4, 64, 512), rate=0.5) -> np.ndarray:
    return np.asarray(jitted(jnp.ones(shape), key, rate)) == 0


def deviation(hits: np.ndarray, rate: float) -> float:
    """How many standard deviations the share of hits is away from the rate."""
    return abs(hits.mean() - rate) / np.sqrt(rate * (1 - rate) / hits.size)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_the_rate_and_the_scale(rate):
    x = jax.random.normal(jax.random.key(1), (8, 256, 512))
    dropped = np.asarray(jitted(x, KEY, rate))
    kept = dropped != 0
    assert deviation(~kept, rate) < 4
    np.testing.assert_allclose(dropped[kept], np.asarray(x / (1 - rate))[kept], rtol=1e-6)
    # In each vector and in each feature the number of hits varies as in independent draws.
    for axis, count in ((-1, 512), ((0, 1), 8 * 256)):
        variance = kept.sum(axis=axis).var() / (count * rate * (1 - rate))
        assert abs(variance - 1) < 0.2


def test_rate_zero_and_almost_one():
    x = jnp.ones((2, 128))
    np.testing.assert_array_equal(jitted(x, KEY, 0.0), x)
    assert not jitted(x, KEY, 1 - 1e-12).any()


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_values_are_independent(rate):
    """No pair of vectors, of features, of neighbors at any distance, of keys is correlated."""
    hits = (mask(rate=rate).reshape(256, 512) - rate) / np.sqrt(rate * (1 - rate))
    for matrix in (hits, hits.T):
        products = (matrix @ matrix.T / np.sqrt(matrix.shape[1]))[np.triu_indices(len(matrix), 1)]
        assert abs(products.var() - 1) < 0.05 and abs(products).max() < 8
    for distance in (1, 2, 3, 8, 64, 128, 256):
        pairs = hits[:, distance:] * hits[:, :-distance]
        assert abs(pairs.mean()) * np.sqrt(pairs.size) < 4
    layers = jax.random.split(KEY, 8)
    steps = [jax.random.fold_in(KEY, step) for step in range(100, 108)]
    flat = [
        (mask(key, rate=rate).ravel() - rate) / np.sqrt(rate * (1 - rate))
        for key in (*layers, *steps)
    ]
    between = (np.stack(flat) @ np.stack(flat).T / np.sqrt(flat[0].size))[np.triu_indices(16, 1)]
    assert abs(between).max() < 4.5


def test_the_bits_are_uniform():
    words = jax.random.bits(KEY, (256, 2), "uint32")
    bits = np.asarray(random_bits(words, 1024)).ravel()
    for shift in (0, 8, 16, 24):
        counts = np.bincount((bits >> shift) & 255, minlength=256)
        chi2 = ((counts - bits.size / 256) ** 2 / (bits.size / 256)).sum()
        assert abs(chi2 - 255) < 4 * np.sqrt(2 * 255)
    # Words that are close, as a weak generator's would be.
    close = jnp.stack([jnp.arange(256, dtype=jnp.uint32), jnp.zeros(256, jnp.uint32)], axis=-1)
    hits = np.asarray(random_bits(close, 1024)) < 2**31
    assert deviation(hits, 0.5) < 4


def test_the_mask_depends_on_key_and_place_alone():
    whole = mask()
    np.testing.assert_array_equal(mask(shape=(2, 48, 512)), whole[:2, :48])
    np.testing.assert_array_equal(mask(shape=(2, 48, 100)), whole[:2, :48, :100])
    assert (mask(jax.random.key(1)) != whole).any()
    # Compiled or not, in any dtype, under vmap, and sharded over eight devices in every way.
    x = jnp.ones((4, 64, 512), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(dropout(x, KEY, 0.5)) == 0, whole)
    keys = jax.random.split(KEY, 3)
    mapped = jax.vmap(lambda key: dropout(x, key, 0.5))(keys)
    for key, own in zip(keys, mapped, strict=True):
        np.testing.assert_array_equal(np.asarray(own) == 0, mask(key))
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    for axes in (("a", "b", "c"), (None, None, ("a", "b", "c")), (None, ("a", "b"), None)):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
        np.testing.assert_array_equal(np.asarray(jitted(placed, KEY, 0.5)) == 0, whole)


def test_the_backward_pass_has_the_same_mask_and_does_not_store_it():
    x = jax.random.normal(jax.random.key(1), (2, 8, 64))
    forward, pull = jax.vjp(functools.partial(dropout, key=KEY, rate=0.3), x)
    (back,) = pull(jnp.ones_like(x))
    np.testing.assert_allclose(forward, np.asarray(x) * np.asarray(back), rtol=1e-6)
    assert {leaf.shape for leaf in jax.tree.leaves(pull)} == {(2, 8, 2)}
    _, tangent = jax.jvp(functools.partial(dropout, key=KEY, rate=0.3), (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(tangent, back, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5), (0, 5), (3, 0)])
def test_any_shape(shape):
    out = jitted(jnp.ones(shape), KEY, 0.5)
    assert out.shape == shape and set(np.unique(out)) <= {0.0, 2.0}
