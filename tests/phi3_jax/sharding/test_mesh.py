"""Where arrays lie on the mesh; a model loaded onto one computes what it does on one device."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import phi3_jax
from phi3_jax import UserError
from phi3_jax.checkpoint.index import StoredTensor
from phi3_jax.sharding.mesh import choose_axes, for_at_most, make_mesh
from phi3_jax.sharding.rules import state_shardings
from tests.conftest import SHAPES, forward, tiny_hf_model

pytestmark = pytest.mark.usefixtures("compiled_anew")

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
TOKENS = np.random.default_rng(0).integers(3, 128, (8, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mesh")
    tiny_hf_model(**SHAPES["gqa"]).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_onto_a_mesh(checkpoint, sizes, dtype):
    mesh = make_mesh(*sizes)
    alone = phi3_jax.load(checkpoint, dtype=dtype)
    spread = phi3_jax.load(checkpoint, dtype=dtype, mesh=mesh)
    shardings = state_shardings(nnx.state(spread), mesh)
    for (path, array), sharding in zip(
        jax.tree.leaves_with_path(nnx.state(spread)), jax.tree.leaves(shardings), strict=True
    ):
        assert array.sharding.is_equivalent_to(sharding, array.ndim), path
    kernel = spread.model.layers.mlp.down_proj.kernel[...]
    cut = {"fsdp": sizes[1], "tensor": sizes[2]}
    assert kernel.addressable_shards[0].data.shape == (3, 96 // cut["tensor"], 64 // cut["fsdp"])
    chex.assert_trees_all_equal(nnx.state(spread), nnx.state(alone))
    if dtype == "float32":
        expected = forward(alone, TOKENS)
        np.testing.assert_allclose(forward(spread, TOKENS), expected, rtol=0, atol=2e-4)


def test_only_the_needed_part_is_read(checkpoint, monkeypatch):
    """No process reads a whole matrix that is cut over its devices."""
    read: list[tuple[str, tuple[int, ...]]] = []
    original = StoredTensor.read

    def spy(self, index=None):
        part = original(self, index)
        read.append((self.name, part.shape))
        return part

    monkeypatch.setattr(StoredTensor, "read", spy)
    phi3_jax.load(checkpoint, mesh=make_mesh(1, 8, 1))
    shapes = {shape for name, shape in read if name.endswith("layers.0.mlp.gate_up_proj.weight")}
    assert shapes == {(192, 8)}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, -1, 1), "does not fit 8"),
        ((4, 4, 1), "at most that number"),
        ((-1, -1, 1), "one axis can"),
    ],
)
def test_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(*sizes)


def test_axes_that_the_program_chooses():
    """Weights are cut no further than to half of a device's memory."""
    assert choose_axes(7, 8, 16) == (8, 1, 1)
    assert choose_axes(9, 8, 16) == (4, 2, 1)
    assert choose_axes(27, 8, 16) == (2, 4, 1)
    assert choose_axes(27, 6, 16) == (1, 6, 1)
    assert choose_axes(1000, 8, 16) == (1, 8, 1)
    assert choose_axes(7, 8, None) == (1, 8, 1)


def test_axes_for_the_members_of_a_sweep():
    """Several processes leave no device idle."""
    assert for_at_most(3, 8, 1, all_devices=False) == (3, 1)
    assert for_at_most(3, 8, 1, all_devices=True) == (2, 4)
    assert for_at_most(5, 4, 2, all_devices=True) == (4, 2)
    assert for_at_most(1, 3, 2, all_devices=True) == (1, 6)
    assert for_at_most(5, 6, 2, all_devices=True) == (4, 3)
