"""A wrapped stack of layers with fused slices and unequal ranks, and its arrays one by one."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

import lora_flax
from tests.lora_flax.nets import DEPTH, WIDTH, Stacked, randomize

CONFIG = lora_flax.LoraConfig(
    r=3,
    lora_alpha=6,
    target_modules=["q_proj", "v_proj", "up_proj", "lm_head"],
    rank_pattern={"layers.1.up_proj": 2, "v_proj": 2},
)
SLICES = {"q_proj": slice(0, 3), "v_proj": slice(4, WIDTH)}


def wrapped_stack(**changes) -> tuple[Stacked, nnx.State]:
    """The model, and its trainable state with every A and B away from zero."""
    model = Stacked(nnx.Rngs(0))
    model.layers.attn.qkv_proj.slices = (("q_proj", 3), ("k_proj", 1), ("v_proj", 2))
    config = CONFIG if not changes else lora_flax.LoraConfig(**vars(CONFIG) | changes)
    lora_flax.wrap(model, config, rngs=nnx.Rngs(1))
    randomize(model)
    trains = lora_flax.mark_only_lora_as_trainable(model)
    state = nnx.split(model, trains, ...)[1]
    return model, masked(state)


def rank_of(name: str, layer: int) -> int:
    return 2 if name == "v_proj" or (name == "up_proj" and layer == 1) else 3


def masked(tree: nnx.State) -> nnx.State:
    """The tree with zeros where a layer's rank is below 3."""
    flat = nnx.to_flat_state(tree)
    for path, variable in flat:
        array, is_a = np.array(variable.get_value()), path[-1] == "lora_A"
        if "qkv_proj" in path and is_a:
            array[..., 5] = 0  # the third column of v_proj
        if "qkv_proj" in path and path[-1] == "lora_B":
            array[:, 2, 3:] = 0
        if "up_proj" in path and path[-1] in ("lora_A", "lora_B"):
            array[(1, slice(None), 2) if is_a else (1, 2)] = 0
        variable.set_value(jax.numpy.asarray(array))
    return nnx.from_flat_state(flat)


def random_like(tree: nnx.State, seed: int) -> nnx.State:
    rng = np.random.default_rng(seed)
    made = jax.tree.map(lambda a: jax.numpy.asarray(rng.normal(size=a.shape), a.dtype), tree)
    return masked(made)


def one_by_one(tree: nnx.State) -> dict[str, np.ndarray]:
    """Each layer's and slice's arrays by name, without padding, as PEFT has them."""
    found = {}
    for path, variable in nnx.to_flat_state(tree):
        value, *names = np.array(variable.get_value()), *map(str, path)
        layers = range(DEPTH) if names[0] == "layers" else [-1]
        slices = SLICES if "qkv_proj" in names else {names[names.index("adapters") - 1]: None}
        for layer in layers:
            array = value if layer < 0 else value[layer]
            for index, (name, columns) in enumerate(slices.items()):
                rank, part = rank_of(name, layer), array
                if columns is not None and names[-1] == "lora_A":
                    part = part[:, 3 * index : 3 * index + 3]
                elif columns is not None:
                    width = [3, 2][index]
                    part = part[..., 3 * index : 3 * index + width]
                if names[-1] in ("lora_A", "lora_B"):
                    part = part[:, :rank] if names[-1] == "lora_A" else part[:rank]
                found[f"{layer}.{name}.{names[-1]}"] = part
    return found
