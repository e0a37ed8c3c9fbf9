"""Decoding on a CPU reads each layer's weights where they are."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax.generation import generate as module
from phi3_jax.generation.layers import separate_layers

# A kernel of a layer [32, 96] is nothing else's shape.
CONFIG = phi3_jax.Phi3Config(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
)  # fmt: skip


def adapted() -> phi3_jax.Phi3:
    model = phi3_jax.Phi3(CONFIG, rngs=nnx.Rngs(0))
    config = lora_flax.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="gaussian"
    )
    lora_flax.wrap(model, config, rngs=nnx.Rngs(1))
    adapter = model.model.layers.mlp.down_proj.adapters["default"]
    adapter.lora_B.set_value(jax.random.normal(jax.random.key(2), adapter.lora_B[...].shape))
    return model


def test_layers_share_the_memory_of_the_stack():
    model = adapted()
    layers = separate_layers(model)
    stacks = jax.tree.leaves(nnx.state(model.model.layers))
    for index, layer in enumerate(layers):
        leaves = jax.tree.leaves(layer)
        for stack, leaf in zip(stacks, leaves, strict=True):
            assert (leaf == stack[index]).all()
            start = stack.unsafe_buffer_pointer() + index * leaf.nbytes
            assert leaf.nbytes % 64 or leaf.unsafe_buffer_pointer() == start
    assert len(layers) == CONFIG.num_hidden_layers


def test_decoding_copies_no_weights_and_gives_the_tokens_of_the_loop(monkeypatch):
    model, prompts = adapted(), [[5, 6, 7], [8]]
    limits = [6, 4]
    separate = phi3_jax.generate(model, prompts, limits)
    inputs = module._prepare(model, prompts, limits, 0.0, 1.0, 0, 0.0, 1.0)
    graphdef, state = nnx.split(model)
    key, stops = jax.random.key(0), jnp.zeros(0, jnp.int32)
    carry = jax.eval_shape(lambda: module._begin(model, inputs, key))

    def copies(layers) -> int:
        arrays = module._Arrays(state, layers)
        step = module._jit_advance.lower(graphdef, arrays, inputs, carry, stops, key).compile()
        return len(
            re.findall(r"= f32\[(?:1,)?32,96\]\S* (?:fusion|dynamic-slice|copy)\(", step.as_text())
        )

    assert copies(separate_layers(model)) == 0 < copies(())
    monkeypatch.setattr(module, "separate_layers", lambda model: ())
    assert phi3_jax.generate(model, prompts, limits) == separate
