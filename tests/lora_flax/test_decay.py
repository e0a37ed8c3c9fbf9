"""Weight decay goes where HF's Trainer applies it, by the names of PEFT's model."""

import jax
import jax.numpy as jnp
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx

import lora_flax
from lora_flax import LoraConfig
from tests.lora_flax.encoder import Encoder, peft_model

CASES = {
    "dora": {"target_modules": ["up_proj", "conv"], "use_dora": True},
    "bias of B": {"target_modules": ["qkv_proj", "head"], "lora_bias": True},
    "biases": {"target_modules": ["up_proj", "head"], "bias": "all"},
    "whole modules": {
        "target_modules": ["up_proj", "embed_tokens"],
        "modules_to_save": ["norm", "head", "layers.1.down_proj"],
    },
    "tokens": {"target_modules": ["down_proj"], "trainable_token_indices": [2, 5]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_as_the_trainer(case):
    fields = CASES[case]
    model = Encoder(nnx.Rngs(0))
    twin = peft_model(model, r=2, **fields)
    decayed = transformers.Trainer.get_decay_parameter_names(None, twin)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                parameter.fill_(float(name in decayed))
    theirs = peft.get_peft_model_state_dict(twin, save_embedding_layers=False)

    lora_flax.wrap(model, LoraConfig(r=2, **fields))
    trainable = nnx.state(model, lora_flax.mark_only_lora_as_trainable(model))
    mask = lora_flax.decay_mask(trainable)
    nnx.update(model, jax.tree.map(lambda a, m: jnp.full_like(a, m), trainable, mask))
    ours = lora_flax.to_peft(model).tensors
    assert {key: value.max() for key, value in ours.items()} == {
        key: value.max().item() for key, value in theirs.items()
    }
    assert (set(jax.tree.leaves(mask)) == {True}) == (case in ("dora", "tokens"))


def test_as_the_mask_of_an_optimizer():
    model = Encoder(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["norm"]))
    trainable = nnx.state(model, lora_flax.mark_only_lora_as_trainable(model))
    tx = optax.adamw(0.1, weight_decay=0.5, mask=lora_flax.decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = tx.update(zeros, tx.init(trainable), trainable)
    moved = {str(path[-1]) for path, u in nnx.to_flat_state(updates) if u.get_value().any()}
    assert moved == {"lora_A"}  # B is zero, and the norm does not decay
