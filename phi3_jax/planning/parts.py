"""Which part of a training step an operation belongs to, by the JAX scopes in its name.

A name such as `jit(train_step)/while/body/transpose(jvp())/checkpoint/rematted_computation/mlp/
lora/dot_general` says all that is needed: `transpose` is the backward pass, `rematted_computation`
is the forward pass repeated for it, and the innermost scope of the network is the part.
"""

from __future__ import annotations

import re

# Scopes of the network, the loss, and the step, from `jax.named_scope`, and JAX's own random
# numbers, which only dropout needs.
SCOPES = {
    "embed_tokens": "embedding",
    "rms_norm": "norms",
    "rotary": "rotary",
    "attention": "attention",
    "qkv_proj": "qkv_proj",
    "o_proj": "o_proj",
    "gate_up_proj": "gate_up_proj",
    "down_proj": "down_proj",
    "lora": "LoRA",
    "dropout": "dropout",
    "_threefry_split": "dropout",
    "_threefry_fold_in": "dropout",
    "self_attn": "around attention",
    "mlp": "SwiGLU",
    "loss": "loss",
    "optimizer": "optimizer",
}
COPIES, COLLECTIVES, OTHER = "copies", "collectives", "other"
PARTS = (*dict.fromkeys(SCOPES.values()), COPIES, COLLECTIVES, OTHER)
PHASES = ("forward", "recomputed", "backward", "update")
_WORDS = re.compile(r"[\w.\-]+")


def part_of(name: str) -> str:
    """The part of the step, one of `PARTS`."""
    known = (SCOPES[word] for word in reversed(_WORDS.findall(name)) if word in SCOPES)
    return next(known, OTHER)


def phase_of(name: str) -> str:
    """The phase, one of `PHASES`; `update` is all that is not differentiated."""
    if "rematted_computation" in name:
        return "recomputed"
    if "transpose(" in name:
        return "backward"
    return "forward" if "jvp(" in name else "update"
