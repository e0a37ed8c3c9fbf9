"""Where arrays lie on the mesh; a model loaded onto one computes what it does on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lora_flax
import phi3_jax
from phi3_jax import UserError
from phi3_jax.sharding.mesh import (
    choose_axes,
    make_mesh,
    optimizer_shardings,
    spec_of,
    state_shardings,
)
from tests.conftest import SHAPES, tiny_hf_model

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
    jax.tree.map(np.testing.assert_array_equal, nnx.state(spread), nnx.state(alone))
    if dtype == "float32":
        graphdef, state = nnx.split(spread)
        logits = jax.jit(lambda s: nnx.merge(graphdef, s)(TOKENS))(state)
        np.testing.assert_allclose(logits, alone(TOKENS), rtol=0, atol=2e-4)


def test_only_the_needed_part_is_read(checkpoint, monkeypatch):
    """No process reads a whole matrix that is cut over its devices."""
    read: list[tuple[str, tuple[int, ...]]] = []
    from phi3_jax.checkpoint import weights

    original = weights.read_tensor

    def spy(file, name, index=None):
        part = original(file, name, index)
        read.append((name, part.shape))
        return part

    monkeypatch.setattr(weights, "read_tensor", spy)
    phi3_jax.load(checkpoint, mesh=make_mesh(1, 8, 1))
    shapes = {shape for name, shape in read if name.endswith("layers.0.mlp.gate_up_proj.weight")}
    assert shapes == {(192, 8)}


def test_adapters_and_moments_follow_their_weights():
    mesh = make_mesh(2, 2, 2)
    layer = ("model", "layers", "self_attn")
    assert spec_of((*layer, "qkv_proj", "kernel"), (3, 64, 96), mesh) == P(None, "fsdp", "tensor")
    path = (*layer, "o_proj", "adapters", "default")
    assert spec_of((*path, "lora_A"), (3, 64, 4), mesh) == P(None, "tensor", None)
    assert spec_of((*path, "lora_B"), (3, 4, 64), mesh) == P(None, None, "fsdp")
    assert spec_of((*layer, "qkv_proj", "kernel"), (3, 63, 97), mesh) == P(None, None, None)
    assert spec_of(("model", "norm", "weight"), (64,), mesh) == P()

    config = phi3_jax.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = phi3_jax.Phi3(config, rngs=nnx.Rngs(0))
    lora_flax.wrap(model, lora_flax.LoraConfig(r=4, target_modules="all-linear"), rngs=nnx.Rngs(0))
    trainable = nnx.state(model, lora_flax.mark_only_lora_as_trainable(model))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    shardings = optimizer_shardings(tx, trainable, mesh)
    state = jax.jit(tx.init, out_shardings=shardings)(trainable)
    own = jax.tree.leaves(state_shardings(trainable, mesh))
    moments = [x for x in jax.tree.leaves(state) if jnp.ndim(x) > 1]
    assert len(moments) == 2 * len(own)
    for array, sharding in zip(moments, own * 2, strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((3, -1, 1), "does not fit 8"), ((4, 4, 1), "at most their number"), ((-1, -1, 1), "one of")],
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
