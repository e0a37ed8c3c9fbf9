"""The decoder layers' arrays one by one, for decoding on a CPU.

Decoding reads each weight once per token, so the memory bandwidth limits it. A loop over stacked
layers copies each layer's weights out of the stack before it multiplies by them, and moves about
three times as many bytes. Separate arrays need no copy; they are views of the stack.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from phi3_jax.model.network import Phi3

LayerArrays = tuple[nnx.State[Any, Any], ...]


def separate_layers(model: Phi3) -> LayerArrays:
    """The arrays of each layer, sharing memory with the stack; empty unless all are on one CPU.

    An array whose size is not a multiple of 64 bytes is copied: JAX shares only aligned memory.
    """
    state = nnx.state(model.model.layers)
    leaves, structure = jax.tree.flatten(state)
    devices = {device for leaf in leaves for device in leaf.devices()}
    device, *others = devices
    if others or device.platform != "cpu":
        return ()
    stacks = [np.asarray(leaf) for leaf in leaves]
    return tuple(
        jax.tree.unflatten(structure, [jax.device_put(stack[index], device) for stack in stacks])
        for index in range(model.config.num_hidden_layers)
    )
