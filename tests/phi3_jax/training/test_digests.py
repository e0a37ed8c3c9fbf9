"""Digests: equal whatever the mesh, different after any change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from phi3_jax.training.digests import digests


def digest_of(array) -> str:
    return digests({"a": jnp.asarray(array)})["a"].text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int32"])
def test_every_flipped_bit_changes_it(dtype):
    size = jnp.dtype(dtype).itemsize
    data = np.random.default_rng(0).integers(0, 256, 4 * size, np.uint8)
    seen = {digest_of(data.view(jnp.dtype(dtype)))}
    for position in range(8 * data.size):
        changed = data.copy()
        changed[position // 8] ^= 1 << position % 8
        seen.add(digest_of(changed.view(jnp.dtype(dtype))))
    assert len(seen) == 1 + 8 * data.size


def test_the_place_of_a_number_counts():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest_of(np.array([True, False])) != digest_of(np.array([False, True]))
    changed = [array[::-1], array[:, ::-1], array.T.reshape(3, 4), np.roll(array, 1), array * 0]
    assert len({digest_of(each) for each in [array, *changed]}) == 6


def test_it_does_not_depend_on_the_mesh():
    array = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    for spec in (("x", "y"), ("y", "x"), (None, "x"), ()):
        placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert digest_of(placed) == digest_of(array)


def test_values_that_are_not_finite_are_named():
    for value, finite in ((1.0, True), (np.inf, False), (np.nan, False)):
        assert digests({"a": jnp.full(3, value)})["a"].finite == finite
