"""The name table: every tensor of a Hugging Face checkpoint and its place in the network.

Module paths are HF's names, so conversion is one rule: a `kernel` is the transpose of HF's
`weight`, everything else is `weight` unchanged, and a stack of layers has one HF tensor per layer,
with the layer index after the stack's path:

    model.layers.self_attn.qkv_proj.kernel [L, in, out]
        <-> model.layers.{0 .. L-1}.self_attn.qkv_proj.weight [out, in]
"""

from __future__ import annotations

import dataclasses

from flax import nnx

from phi3_jax.model.network import Phi3


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of an HF checkpoint and its place in the network.

    Attributes:
        name: HF's name.
        shape: HF's shape.
        path: path of the NNX parameter that holds it.
        layer: index in a stacked parameter; None if not stacked.
        transpose: whether the parameter holds the transpose.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None
    transpose: bool


def tensor_table(model: Phi3) -> list[HFTensor]:
    """Every tensor of this model's checkpoint, in network order.

    Args:
        model: a model without wrappers; shapes are enough, see `abstract_model`.
    """
    table = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        *module, leaf = (str(part) for part in path)
        stacked = module[:2] == ["model", "layers"]
        shape = variable.shape[1:] if stacked else variable.shape
        transpose = leaf == "kernel"
        for layer in range(model.config.num_hidden_layers) if stacked else (None,):
            index = [] if layer is None else [str(layer)]
            name = ".".join([*module[:2], *index, *module[2:], "weight"])
            hf_shape = shape[::-1] if transpose else shape
            table.append(HFTensor(name, hf_shape, (*module, leaf), layer, transpose))
    return table
