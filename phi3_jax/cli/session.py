"""A loaded model with its tokenizer, ready to answer prompts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

import phi3_jax
from phi3_jax.checkpoint.adapters import load_with_adapter, open_with_adapter
from phi3_jax.data.tokenizer import load_tokenizer, tokenizer_folder
from phi3_jax.generation.answers import stop_ids
from phi3_jax.platform import compute_dtype, keep_compiled, set_quantized_matmul


@dataclass
class Session:
    """A model, its tokenizer, and the token ids that end an answer."""

    model: phi3_jax.Phi3
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]


def open_session(args: argparse.Namespace, rows: int) -> Session:
    """Load the model given by `--model`, `--adapter` and `--dtype`.

    Args:
        args: parsed by `phi3_jax.cli.arguments.add_model`.
        rows: number of prompts answered at once.

    Raises:
        UserError, lora_flax.LoraError: the model or adapter cannot be loaded.
    """
    keep_compiled()
    checkpoint, adapter = open_with_adapter(args.model, args.adapter)
    tokenizer = load_tokenizer(tokenizer_folder(checkpoint.directory, adapter))
    dtype = compute_dtype(args.dtype)
    model = load_with_adapter(checkpoint, adapter, dtype, args.rope_factors)
    set_quantized_matmul(model, "auto", 1, rows, dtype)
    return Session(model, tokenizer, stop_ids(checkpoint.directory, tokenizer))


def say(text: str) -> None:
    """Print a remark that is not part of an answer."""
    print(text, file=sys.stderr)
