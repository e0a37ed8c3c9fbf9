"""FLOPs that training the model takes by its definition, whatever a program spends on it."""

from __future__ import annotations

import numpy as np

from phi3_jax.model.config import Phi3Config


def layer_weights(config: Phi3Config) -> int:
    """Weights of the dense layers that every token passes, the head apart."""
    attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp)


def lora_step_flops(
    config: Phi3Config, positions: np.ndarray, segment_ids: np.ndarray, targets: np.ndarray
) -> int:
    """Model FLOPs of a LoRA training step: what MFU compares with the device's peak.

    Forward and backward multiply each frozen weight twice a token: 4 N FLOPs, N being the weights
    of the dense layers, and of the head for target positions. Attention's causal scores and sums
    count three times their forward pass. What rematerialization recomputes, padding, and the
    adapter's own products do not count. (Counted as in PaLM, Chowdhery et al. 2022, appendix B,
    without the gradients of frozen weights.)

    Args:
        config: the network.
        positions: int32 `[..., S]`, counted from 0 in each segment.
        segment_ids: int32 `[..., S]`; 0 is padding.
        targets: bool `[..., S]`, the positions that the loss is computed for.
    """
    real = segment_ids > 0
    keys = positions[real].astype(np.int64) + 1
    if config.sliding_window is not None:
        keys = np.minimum(keys, config.sliding_window)
    # Scores and weighted values: two products of head_dim, a multiply-add being two FLOPs.
    attention = 4 * config.num_hidden_layers * config.q_size * int(keys.sum())
    head = config.hidden_size * config.vocab_size
    dense = layer_weights(config) * int(real.sum()) + head * int(targets.sum())
    return 4 * dense + 3 * attention
