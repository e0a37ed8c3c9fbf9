"""The adapter of a planned run, shapes and dtypes only."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

import lora_flax
from phi3_jax.checkpoint.vocabulary import rows_with, with_tokens
from phi3_jax.config.loader import RunConfig
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3
from phi3_jax.training.setup import continued_adapter
from phi3_jax.training.sweep.members import sweep_members


def what_trains(
    config: RunConfig, model_config: Phi3Config
) -> tuple[lora_flax.LoraConfig, Phi3Config]:
    """What trains, and the network with the rows of all its tokens.

    Of a sweep it is what the member with the largest rank trains, to which the others are padded.
    An adapter that the run continues from has its own rank and targets. New tokens are counted as
    rows of their own: only the tokenizer knows whether the checkpoint has spare ones.

    Raises:
        UserError, lora_flax.LoraError: the adapter does not exist or is damaged.
    """
    adapter, rows = continued_adapter(config), model_config.vocab_size
    if adapter is not None:
        lora, rows = lora_flax.read_peft_config(adapter), rows_with(model_config, adapter)
    else:
        lora = max((m.config.peft.to_lora() for m in sweep_members(config)), key=lambda own: own.r)
        if config.data.add_tokens:
            new_ids = range(rows, rows + len(config.data.add_tokens))
            lora, rows = with_tokens(lora, new_ids, model_config), new_ids.stop
    return lora, dataclasses.replace(model_config, vocab_size=rows)


def with_adapter(base: Phi3, lora: lora_flax.LoraConfig) -> Phi3:
    """A model of shapes with an adapter; `base` is left unchanged.

    Raises:
        lora_flax.LoraError: a target matches no layer.
    """
    model: Phi3 = nnx.eval_shape(functools.partial(_wrap, config=lora), base)
    return model


def ensemble_of(base: Phi3, lora: lora_flax.LoraConfig) -> tuple[Any, Any, Any, Any]:
    """Graphdef, trainable arrays, constants, and frozen arrays of `lora_flax.wrap_many`, as shapes.

    The arrays are those of one adapter, without the leading axis; `base` is left unchanged.

    Raises:
        lora_flax.LoraError: a target matches no layer.
    """
    graphdefs = []

    def split(model: Phi3) -> tuple[Any, Any, Any]:
        many = lora_flax.wrap_many(model, [_plain(lora)], [nnx.Rngs(0)])
        graphdefs.append(many.graphdef)
        trainable, constants = jax.tree.map(lambda leaf: leaf[0], (many.trainable, many.constants))
        return trainable, constants, many.frozen

    trainable, constants, frozen = nnx.eval_shape(split, base)
    return graphdefs[0], trainable, constants, frozen


def _wrap(model: Phi3, config: lora_flax.LoraConfig) -> Phi3:
    """Add the adapter."""
    lora_flax.wrap(model, _plain(config), rngs=nnx.Rngs(0))
    return model


def _plain(config: lora_flax.LoraConfig) -> lora_flax.LoraConfig:
    """The config with the default init of A and B, as init does not change shapes."""
    return lora_flax.LoraConfig(**(config.to_json() | {"init_lora_weights": True}))
