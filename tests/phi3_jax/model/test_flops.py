"""Model FLOPs of a LoRA step."""

from __future__ import annotations

import numpy as np
import pytest
import transformers

from phi3_jax.model.config import Phi3Config
from phi3_jax.model.flops import layer_weights, lora_step_flops
from tests.conftest import tiny_hf_model


def row(lengths: list[int], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, segments and targets of examples packed into a row, all tokens learned."""
    used, rest = sum(lengths), size - sum(lengths)
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(rest, int)])
    segments = np.concatenate([np.full(n, i) for i, n in enumerate(lengths, 1)] + [np.zeros(rest)])
    return positions[None], segments[None], (np.arange(size) < used)[None]


@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 2}, {"head_dim": 24}])
def test_weights_are_those_of_the_dense_layers(overrides):
    model = tiny_hf_model(**overrides)
    sizes = [p.numel() for n, p in model.named_parameters() if "proj" in n]
    config = Phi3Config.from_hf(model.config.to_dict(), "x")
    assert layer_weights(config) == sum(sizes)


def test_dense_and_causal_attention():
    """Phi-3-mini, one row of 4,096 learned tokens: 61.0 TFLOP and 9.7 of attention."""
    config = Phi3Config()
    weights = transformers.Phi3Config().hidden_size * 32064 + layer_weights(config)
    assert weights == 3_722_379_264 - 0  # without the embedding and the norms
    pairs = 4096 * 4097 // 2
    expected = 4 * weights * 4096 + 3 * 4 * 32 * 3072 * pairs
    assert lora_step_flops(config, *row([4096], 4096)) == expected


def test_padding_and_packing_do_not_count():
    config = Phi3Config(num_hidden_layers=2)
    alone = [lora_step_flops(config, *row([n], n)) for n in (5, 9)]
    assert lora_step_flops(config, *row([5, 9], 20)) == sum(alone)
    positions, segments, targets = row([5], 8)
    head = 4 * config.hidden_size * config.vocab_size
    assert alone[0] - lora_step_flops(config, positions, segments, targets & False) == 5 * head


def test_a_sliding_window_limits_the_keys():
    wide, narrow = Phi3Config(), Phi3Config(sliding_window=3)
    difference = lora_step_flops(wide, *row([5], 5)) - lora_step_flops(narrow, *row([5], 5))
    assert difference == 3 * 4 * 32 * 3072 * (1 + 2)
