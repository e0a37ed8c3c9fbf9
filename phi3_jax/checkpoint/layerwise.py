"""A checkpoint with an adapter, one decoder layer at a time.

The embedding, the final norm, the head, and the adapter are loaded; the decoder layers are read
from the files when they are used. Merging or running a model this way takes the memory of one
layer, whatever the size of the model:

    stream = Layerwise.open(checkpoint, adapter, "bfloat16")
    stream.logits(tokens)                  # with the adapter
    config, table, arrays = stream.merged()    # one merged tensor after the other
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_flax
from lora_flax import BitsAndBytesConfig
from phi3_jax.checkpoint.abstract import abstract_model
from phi3_jax.checkpoint.adapters import read_quantization
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.checkpoint.names import HFTensor, tensor_table
from phi3_jax.checkpoint.saving import hf_array, untie
from phi3_jax.checkpoint.vocabulary import ADAPTER_CONFIG, load_adapter
from phi3_jax.model.blockwise import Tokens
from phi3_jax.model.config import Phi3Config, read_json_object
from phi3_jax.model.network import Phi3
from phi3_jax.model.rope import default_positions, rotary_tables

Path = tuple[str, ...]

_STACK = ("model", "layers")


@dataclasses.dataclass(frozen=True, eq=False)
class Layerwise:
    """A checkpoint whose decoder layers are read one at a time.

    Attributes:
        model: the model with its adapter, if any. The base's arrays of its decoder layers take no
            memory and hold no values.
        dtype: dtype of the weights.
        tensors: the tensors of each parameter, in the order of its stack.
        read: reads one of them in the network's layout.
    """

    model: Phi3
    dtype: np.dtype[Any]
    tensors: dict[Path, list[HFTensor]]
    read: Callable[[HFTensor], jax.Array]

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        adapter: FilePath | None,
        dtype: jnp.dtype | str,
    ) -> Layerwise:
        """Read everything but the decoder layers.

        A base that was quantized when the adapter was trained is rounded in the same way.

        Args:
            checkpoint: the base model.
            adapter: folder of a PEFT adapter; None for the base alone.
            dtype: dtype of the weights, whatever float type the files hold.

        Raises:
            UserError, lora_flax.LoraError: the tensors do not match config.json, or the adapter
                does not match the model.
        """
        quantization = read_quantization(adapter) if adapter is not None else None
        _, table, read = checkpoint.parts(dtype, quantization)
        tensors: dict[Path, list[HFTensor]] = {}
        for tensor in table:
            tensors.setdefault(tensor.path, []).append(tensor)
        whole = adapter is not None and _needs_base(adapter)
        model = hollow_model(checkpoint, dtype, quantization, whole)
        if adapter is not None:
            load_adapter(model, adapter)
        return cls(model, np.dtype(dtype), tensors, read)

    def layer(self, number: int) -> Any:
        """One decoder layer with its adapter, without a stack axis."""
        graphdef, state = nnx.split(self.model.model.layers)
        flat = []
        for path, variable in nnx.to_flat_state(state):
            names = tuple(map(str, path))
            if "adapters" in names or "members" in names:
                value = jax.tree.map(lambda leaf: leaf[number], variable.get_value())
            else:
                plain = (*_STACK, *(name for name in names if name != "base"))
                value = self.read(self.tensors[plain][number])
            flat.append((path, variable.replace(value)))
        layer: Any = nnx.merge(graphdef, nnx.from_flat_state(flat))
        if getattr(layer, "stack_size", None) is not None:
            layer.stack_size = None
        return layer

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Next-token logits of the model with its adapter.

        Args:
            tokens: int32 `[B, S]`.

        Returns:
            float32 `[B, S, V]`.
        """
        model, ids = self.model, jnp.asarray(tokens, jnp.int32)
        x = model.model.embed_tokens(ids)
        for number in range(model.config.num_hidden_layers):
            x = _run(*nnx.split(self.layer(number)), model.config, x)
        return np.asarray(model.head(model.model.norm(x)))

    def merged(self) -> tuple[Phi3Config, list[HFTensor], Iterator[np.ndarray]]:
        """The merged model: its config, the table of its tensors, and these in the table's order.

        The update is added in float32, and the sum is rounded once, to `dtype`. A base that was
        quantized is dequantized first, so that the merged model matches what was trained rather
        than the checkpoint before rounding.

        If only the embedding or only the head of a tied model was trained, one table cannot hold
        both, so the merged model gets a head of its own (see `untie`). PEFT's merged model gives
        different logits in this case (huggingface/peft#2777).

        Raises:
            lora_flax.LoraError: an update that cannot be merged into a weight.
        """
        # Shares the arrays; its layers are left out, for they have no values to merge.
        outer: Any = nnx.merge(*nnx.split(self.model))
        outer.model.layers = nnx.Dict()
        _merge(outer)
        untie(outer)
        config: Phi3Config = outer.config
        table = tensor_table(abstract_model(config, self.dtype))
        count = config.num_hidden_layers
        table.sort(
            key=lambda t: t.layer if t.layer is not None else -1 if "embedding" in t.path else count
        )
        return config, table, self._merged_tensors(table, dict(_values(outer)))

    def _merged_tensors(
        self, table: list[HFTensor], values: dict[Path, jax.Array]
    ) -> Iterator[np.ndarray]:
        for number, tensors in itertools.groupby(table, key=lambda tensor: tensor.layer):
            if number is not None:
                holder = _merge(nnx.Dict(layer=self.layer(number)))
                values |= {(*_STACK, *path[1:]): value for path, value in _values(holder)}
            for tensor in tensors:
                yield self._array(tensor, values[tensor.path])

    def _array(self, tensor: HFTensor, value: jax.Array) -> np.ndarray:
        return hf_array(dataclasses.replace(tensor, layer=None), value, self.dtype)


def hollow_model(
    checkpoint: Checkpoint,
    dtype: jnp.dtype | str,
    quantization: BitsAndBytesConfig | None = None,
    whole: bool = False,
) -> Phi3:
    """A model whose decoder layers take no memory and hold no values, to be given an adapter.

    Args:
        checkpoint: where the embedding, the norm and the head are read.
        dtype: dtype of the weights.
        quantization: how the weights are rounded.
        whole: read the decoder layers too.

    Raises:
        UserError, lora_flax.LoraError: as in `Checkpoint.load`.
    """
    plain, table, read = checkpoint.parts(dtype, quantization)
    graphdef, state = nnx.split(plain)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        found = [tensor for tensor in table if tensor.path == tuple(map(str, path))]
        value: Any = np.broadcast_to(np.zeros((), dtype), variable.shape)
        if found[0].layer is None:
            value = read(found[0])
        elif whole:
            value = jnp.stack([read(tensor) for tensor in found])
        flat.append((path, variable.replace(value)))
    model: Phi3 = nnx.merge(graphdef, nnx.from_flat_state(flat))
    return model


def _needs_base(adapter: FilePath) -> bool:
    """Whether loading an adapter computes something from the base's weights (PiSSA, OLoRA)."""
    start = read_json_object(adapter / ADAPTER_CONFIG).get("init_lora_weights")
    return isinstance(start, str) and start.lower().startswith(("pissa", "olora"))


def _merge(holder: nnx.Module) -> nnx.Module:
    """The same module with the updates of those in it folded in."""
    if lora_flax.adapter_names(holder):
        lora_flax.merge_and_unload(holder)
    return holder


def _values(module: nnx.Module) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        yield tuple(map(str, path)), variable.get_value()


@functools.partial(jax.jit, static_argnums=(0, 2))
def _run(
    graphdef: nnx.GraphDef[Any], state: nnx.State[Any, Any], config: Phi3Config, x: jax.Array
) -> jax.Array:
    """The output of one decoder layer on rows `[B, S, D]` of one segment each."""
    ids = jnp.zeros(x.shape[:2], jnp.int32)
    positions, segments = default_positions(ids, None, None)
    rotary = rotary_tables(config, positions, segments)
    attended = Tokens(positions, segments, positions, segments)
    layer: Any = nnx.merge(graphdef, state)
    y: jax.Array = layer(x, rotary, attended, jnp.int32(0), None, None)[0]
    return y
