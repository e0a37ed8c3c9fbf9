"""The partition spec of every kind of array: plain, quantized, of an adapter, of the optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lora_flax
import phi3_jax
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.sharding.rules import (
    optimizer_shardings,
    shardings_at,
    spec_of,
    state_shardings,
)

pytestmark = pytest.mark.usefixtures("compiled_anew")

CONFIG = phi3_jax.Phi3Config(
    vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=64,
)  # fmt: skip
LORA = lora_flax.LoraConfig(
    r=4, target_modules=[r"qkv_proj", "o_proj", "down_proj", "embed_tokens"],
    modules_to_save=["lm_head"], use_dora=True,
)  # fmt: skip
NF4 = lora_flax.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
LAYERS = "model.layers"
# Mesh axes of each array where a mesh (2, 2, 2) divides them.
SPECS = {
    "model.embed_tokens.base.embedding": P("tensor", "fsdp"),
    "model.embed_tokens.adapters.default.lora_A": P("tensor", None),
    "model.embed_tokens.adapters.default.lora_B": P(None, "fsdp"),
    "model.embed_tokens.adapters.default.lora_magnitude": P(),
    "model.embed_tokens.adapters.default.scale": P(),
    "model.norm.weight": P(),
    f"{LAYERS}.input_layernorm.weight": P(),
    f"{LAYERS}.post_attention_layernorm.weight": P(),
    f"{LAYERS}.self_attn.qkv_proj.base.kernel.codes": P(None, "fsdp", "tensor"),
    f"{LAYERS}.self_attn.qkv_proj.base.kernel.absmax": P(None, "fsdp", "tensor"),
    f"{LAYERS}.self_attn.qkv_proj.base.kernel.nested_absmax": P(),
    f"{LAYERS}.self_attn.qkv_proj.base.kernel.offset": P(),
    f"{LAYERS}.self_attn.qkv_proj.adapters.default.lora_A": P(None, "fsdp", None),
    f"{LAYERS}.self_attn.qkv_proj.adapters.default.lora_B": P(None, None, "tensor"),
    f"{LAYERS}.self_attn.qkv_proj.adapters.default.lora_magnitude": P(),
    f"{LAYERS}.self_attn.qkv_proj.adapters.default.scale": P(),
    f"{LAYERS}.self_attn.o_proj.base.kernel.codes": P(None, "tensor", "fsdp"),
    f"{LAYERS}.self_attn.o_proj.base.kernel.absmax": P(None, "tensor", "fsdp"),
    f"{LAYERS}.self_attn.o_proj.base.kernel.nested_absmax": P(),
    f"{LAYERS}.self_attn.o_proj.base.kernel.offset": P(),
    f"{LAYERS}.self_attn.o_proj.adapters.default.lora_A": P(None, "tensor", None),
    f"{LAYERS}.self_attn.o_proj.adapters.default.lora_B": P(None, None, "fsdp"),
    f"{LAYERS}.self_attn.o_proj.adapters.default.lora_magnitude": P(),
    f"{LAYERS}.self_attn.o_proj.adapters.default.scale": P(),
    f"{LAYERS}.mlp.gate_up_proj.kernel.codes": P(None, "fsdp", "tensor"),
    f"{LAYERS}.mlp.gate_up_proj.kernel.absmax": P(None, "fsdp", "tensor"),
    f"{LAYERS}.mlp.gate_up_proj.kernel.nested_absmax": P(),
    f"{LAYERS}.mlp.gate_up_proj.kernel.offset": P(),
    f"{LAYERS}.mlp.down_proj.base.kernel.codes": P(None, "tensor", "fsdp"),
    f"{LAYERS}.mlp.down_proj.base.kernel.absmax": P(None, "tensor", "fsdp"),
    f"{LAYERS}.mlp.down_proj.base.kernel.nested_absmax": P(),
    f"{LAYERS}.mlp.down_proj.base.kernel.offset": P(),
    f"{LAYERS}.mlp.down_proj.adapters.default.lora_A": P(None, "tensor", None),
    f"{LAYERS}.mlp.down_proj.adapters.default.lora_B": P(None, None, "fsdp"),
    f"{LAYERS}.mlp.down_proj.adapters.default.lora_magnitude": P(),
    f"{LAYERS}.mlp.down_proj.adapters.default.scale": P(),
    "lm_head.base.kernel": P("fsdp", "tensor"),
    "lm_head.adapters.default.kernel": P("fsdp", "tensor"),
}


def quantized_and_wrapped() -> nnx.State:
    def build() -> phi3_jax.Phi3:
        model = phi3_jax.Phi3(CONFIG, rngs=nnx.Rngs(0))
        lora_flax.quantize(model, NF4)
        lora_flax.wrap(model, LORA)
        return model

    return nnx.state(nnx.eval_shape(build))


def names(path) -> str:
    parts = (str(getattr(part, "key", getattr(part, "name", None))) for part in path)
    return ".".join(part for part in parts if part != "value")


def specs(state: nnx.State, mesh) -> dict[str, P]:
    leaves = jax.tree.leaves_with_path(state_shardings(state, mesh))
    return {names(path): sharding.spec for path, sharding in leaves}


def test_every_kind_of_array():
    assert specs(quantized_and_wrapped(), make_mesh(2, 2, 2)) == SPECS


def test_a_part_of_a_state_has_the_same_shardings():
    """As the loader asks for them: the value of one variable, at its path."""
    mesh, state = make_mesh(2, 2, 2), quantized_and_wrapped()
    path = ("model", "layers", "mlp", "gate_up_proj", "kernel")
    value = dict(nnx.to_flat_state(state))[path].get_value()
    assert isinstance(value, lora_flax.QuantizedArray)
    found = shardings_at(path, value, mesh)
    assert found.codes.spec == found.absmax.spec == P(None, "fsdp", "tensor")
    assert found.offset.spec == P()


def test_blocks_never_straddle_a_shard():
    mesh = make_mesh(1, 4, 2)
    path = ("model", "layers", "mlp", "gate_up_proj", "kernel")
    # 6 blocks of inputs over fsdp 4 do not go, 8 do.
    for inputs, fsdp in ((384, None), (512, "fsdp")):
        shapes = {"codes": (3, inputs // 2, 64), "absmax": (3, inputs // 64, 64)}
        for name, shape in shapes.items():
            assert tuple(spec_of((*path, name), shape, mesh)) == (None, fsdp, "tensor")


def test_axes_that_do_not_divide_are_dropped():
    mesh = make_mesh(2, 2, 2)
    path = ("model", "layers", "self_attn", "qkv_proj", "kernel")
    assert spec_of(path, (3, 63, 97), mesh) == P(None, None, None)
    assert spec_of(path, (3, 64, 97), mesh) == P(None, "fsdp", None)


def test_sequence_devices_shard_the_weights_too():
    """Where the sizes allow it: what `fsdp` cuts into 2 is cut into 4."""
    mesh = make_mesh(1, 2, 2, 2)
    path = ("model", "layers", "self_attn", "qkv_proj", "kernel")
    assert spec_of(path, (3, 64, 96), mesh) == P(None, ("fsdp", "sequence"), "tensor")
    assert spec_of(path, (3, 62, 96), mesh) == P(None, "fsdp", "tensor")
    assert spec_of(path, (3, 63, 96), mesh) == P(None, None, "tensor")


def test_moments_follow_their_parameters():
    mesh = make_mesh(2, 2, 2)
    model = phi3_jax.Phi3(CONFIG, rngs=nnx.Rngs(0))
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
