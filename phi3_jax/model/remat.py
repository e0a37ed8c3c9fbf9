"""Rematerialization: which values of a layer the backward pass keeps, and which it computes again.

The values that are costly to compute again have names (`jax.ad_checkpoint.checkpoint_name`), and a
policy may keep any of them:

    attention   the attention's output and the log-sum-exp of its scores
    residual    the residual stream between attention and MLP
    qkv         queries, keys, and values as attention takes them, or as the projection gives them
                where a kernel cuts them (`phi3_jax.model.heads`)
    gate_up     the output of `gate_up_proj`

With all four no matrix product of the base model runs twice, only the operations between them.

Shapes: S tokens, D hidden_size, F intermediate_size, N heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

from phi3_jax.model.config import Phi3Config

Saved = Literal["attention", "residual", "qkv", "gate_up"]
SAVED: tuple[Saved, ...] = get_args(Saved)
# What `lora_flax` calls the narrow side of an update; kept with any of them.
LORA = "lora"
# And the output of a layer whose kernel adds the update, in place of a matrix product.
LORA_MATMUL = "lora_matmul"
# A TPU pads the last axis of an array, here a head, to a multiple of this.
LANES = 128
# A tuple names the values that are kept.
Remat = Literal["none", "dots", "full", "offload"] | tuple[Saved, ...]


def saved(value: jax.Array, name: Saved) -> jax.Array:
    """Name a value, so that a policy can keep it; the value itself is unchanged."""
    named: jax.Array = checkpoint_name(value, name)
    return named


def rematerialized(function: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`function` with that policy for its backward pass, for use under `jax.lax.scan`."""
    if remat == "none":
        return function
    policies: Any = jax.checkpoint_policies
    policy: Callable[..., Any] | None = None  # keep only the layer's inputs
    if remat == "dots":
        # Excludes attention's matmuls, which have batch dimensions: they grow with S squared.
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(LORA_MATMUL)
        )
    elif remat == "offload":
        policy = _offloads()
    elif remat != "full":
        policy = _keeps(remat)
    recomputing: Callable[..., Any] = jax.checkpoint(function, prevent_cse=False, policy=policy)
    return recomputing


def _keeps(names: tuple[Saved, ...]) -> Callable[..., bool]:
    policies: Any = jax.checkpoint_policies
    by_name: Callable[..., bool] = policies.save_only_these_names(*names, LORA)

    def policy(primitive: Any, *args: Any, **params: Any) -> bool:
        # The results of cuDNN's kernel cannot be named.
        is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
        return ("attention" in names and is_cudnn) or by_name(primitive, *args, **params)

    return policy


def _offloads() -> Callable[..., Any]:
    policies: Any = jax.checkpoint_policies
    products = policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    kernels = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LORA_MATMUL],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        chosen = kernels if primitive.name == "name" else products
        return chosen(primitive, *args, **params)

    return policy


def saved_bytes(config: Phi3Config, name: Saved, itemsize: int) -> int:
    """Bytes of a named value for one token of one layer, at most."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head = -(-config.head_dim // LANES) * LANES
    values = {
        "attention": heads * head,
        "residual": config.hidden_size,
        "qkv": (heads + 2 * kv_heads) * head,
        "gate_up": 2 * config.intermediate_size,
    }
    sums = 4 * heads if name == "attention" else 0
    return values[name] * itemsize + sums


def describe(remat: Remat) -> str:
    """The policy in words."""
    return remat if isinstance(remat, str) else f"saves {', '.join(remat)}"
