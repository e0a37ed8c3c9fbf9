"""`Checkpoint`: a Hugging Face model folder, opened once and read by everything that needs it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lora_flax import BitsAndBytesConfig, QuantizedArray
from phi3_jax.checkpoint.abstract import abstract_model, abstract_quantized, model_bytes
from phi3_jax.checkpoint.bitsandbytes import parse_quantization, quantized_tensors
from phi3_jax.checkpoint.hub import resolve
from phi3_jax.checkpoint.index import Index, read_edges, read_index
from phi3_jax.checkpoint.loading import check_tensors, fill, require_finite, tensor_reader
from phi3_jax.checkpoint.mistaken import hint
from phi3_jax.checkpoint.names import HFTensor, tensor_table
from phi3_jax.errors import UserError
from phi3_jax.model.config import Phi3Config, RopeFactors, read_json_object
from phi3_jax.model.network import Phi3


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model folder: its config, the index of its tensors, and methods that read them.

    Opening reads config.json and checks that it describes a Phi-3. Everything else is read once,
    when first needed: the quantization settings, the file headers, the fingerprint.
    The tensors are checked against config.json by `load`.

    Attributes:
        directory: the local folder.
        config: the architecture.
        raw_config: the parsed config.json, unmodified.
    """

    directory: Path
    config: Phi3Config
    raw_config: dict[str, Any] = dataclasses.field(repr=False)
    _abstract: dict[Any, Phi3] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, path_or_repo_id: str | Path, revision: str | None = None) -> Checkpoint:
        """Open a local folder, or a hub id that is downloaded first.

        Args:
            path_or_repo_id: a folder with config.json and `*.safetensors` (one file, or shards with
                their index), or a hub id.
            revision: branch, tag or commit of a hub id.

        Raises:
            UserError: neither a folder nor a model on the hub, not a Phi-3 config, or an adapter.
        """
        directory = resolve(path_or_repo_id, revision)
        file = directory / "config.json"
        if not file.exists() and (directory / "adapter_config.json").exists():
            raise UserError(
                f"{directory} is a PEFT adapter; load its base model, and then the adapter with "
                "lora_flax.load_peft(model, folder)"
            )
        if not file.exists() and (found := hint(directory)) is not None:
            raise UserError(f"{directory}: no config.json there; {found}")
        raw = read_json_object(file)
        return cls(directory, Phi3Config.from_hf(raw, file), raw)

    @functools.cached_property
    def tensors(self) -> Index:
        """Every tensor of the files by name: its file, dtype and shape.

        Raises:
            UserError: no safetensors, a missing shard, or a damaged file; the message names each.
        """
        return read_index(self.directory)

    @functools.cached_property
    def quantization(self) -> BitsAndBytesConfig | None:
        """The settings that the weights were quantized with before they were saved, or None.

        Raises:
            UserError: config.json names settings that this program does not support.
        """
        raw = self.raw_config.get("quantization_config")
        return parse_quantization(raw, self.directory / "config.json") if raw else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest that identifies a base model without reading all of it.

        It covers config.json and, for each tensor, its name, dtype, shape and the bytes of its
        first and last 1,024 values. The same weights sharded differently give the same digest.

        Raises:
            UserError: as in `tensors`.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_hf(), sort_keys=True).encode())
        edges = read_edges(self.tensors)
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(edges[name])
        return digest.hexdigest()

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read one tensor as the files hold it, or the slice of it given by `index`.

        Args:
            name: HF's name, a key of `tensors`.
            index: one slice per axis.
        """
        return self.tensors[name].read(index)

    def kernel(self, name: str) -> np.ndarray:
        """Read a layer's kernel `[in, out]`, in the files' dtype.

        Args:
            name: HF's name of the layer, such as `model.layers.0.mlp.down_proj`.

        Raises:
            UserError: the files hold the kernel quantized.
        """
        weight = f"{name}.weight"
        if weight in self._stored:
            raise UserError(
                f"{self.tensors[weight].file}: {weight} is already quantized; the "
                "unquantized checkpoint is needed"
            )
        return self.read(weight).T

    def bytes(self, dtype: jnp.dtype | str, quantization: BitsAndBytesConfig | None = None) -> int:
        """Bytes taken by the weights that `load` loads, computed from their shapes.

        Args:
            dtype: as in `load`.
            quantization: as in `load`; a pre-quantized checkpoint keeps its own.

        Raises:
            UserError, lora_flax.LoraError: unsupported quantization settings.
        """
        return model_bytes(self._shapes(dtype, self.quantization or quantization))

    def load(
        self,
        dtype: jnp.dtype | str = "float32",
        mesh: Mesh | None = None,
        quantization: BitsAndBytesConfig | None = None,
        rope_factors: RopeFactors = "by_text",
    ) -> Phi3:
        """Load the weights; a pre-quantized checkpoint keeps its own quantization.

        Args:
            dtype: dtype of the loaded weights, whatever float type the files hold.
            mesh: the mesh to shard the weights over, see `phi3_jax.load`; by default everything
                goes to the first device.
            quantization: quantize each weight as soon as it is read.
            rope_factors: how LongRoPE's factors are chosen, see `LongRope.choice`.

        Raises:
            UserError: the tensors do not match config.json, with a message that names the
                first ten missing, unexpected and misshapen ones; or quantization was requested
                for a checkpoint that is already quantized.
            lora_flax.LoraError: a weight that cannot be quantized as requested.
        """
        if self.quantization is not None and quantization is not None:
            raise UserError(f"{self.directory} is already quantized; remove model.quantization")
        return self._load(dtype, mesh, self.quantization or quantization, rope_factors)

    def parts(
        self, dtype: jnp.dtype | str, quantization: BitsAndBytesConfig | None = None
    ) -> tuple[Phi3, list[HFTensor], Callable[[HFTensor], jax.Array]]:
        """What `load` loads, in parts, for a caller that never holds all of it.

        Args:
            dtype: as in `load`.
            quantization: as in `load`; a pre-quantized checkpoint keeps its own.

        Returns:
            The model's shapes and dtypes, unquantized; the table of its tensors; and a function
            that reads one of them in the network's layout. A weight that would be loaded quantized
            is rounded and dequantized again.

        Raises:
            UserError, lora_flax.LoraError: as in `load`.
        """
        quantization = self.quantization or quantization
        table = self._checked_table(dtype, quantization)
        shapes = {
            tuple(map(str, path)): variable.get_value()
            for path, variable in nnx.to_flat_state(nnx.state(self._shapes(dtype, quantization)))
        }

        def read(tensor: HFTensor) -> jax.Array:
            finite: dict[str, jax.Array] = {}
            parameter = (None, tensor.path, jnp.dtype(dtype), shapes[tensor.path])
            value = tensor_reader(self.tensors, self._stored, *parameter, finite)(tensor)
            require_finite(self.tensors, finite, jnp.dtype(dtype))
            return value.dequantize() if isinstance(value, QuantizedArray) else value

        return self._shapes(dtype, None), table, read

    @functools.cached_property
    def _stored(self) -> set[str]:
        """Names of the tensors that the files hold quantized."""
        return quantized_tensors(self.tensors)

    def _load(
        self,
        dtype: jnp.dtype | str,
        mesh: Mesh | None,
        quantization: BitsAndBytesConfig | None,
        rope_factors: RopeFactors,
    ) -> Phi3:
        table = self._checked_table(dtype, quantization)
        abstract = self._shapes(dtype, quantization, rope_factors)
        return fill(abstract, self.tensors, table, self._stored, jnp.dtype(dtype), mesh)

    def _checked_table(
        self, dtype: jnp.dtype | str, quantization: BitsAndBytesConfig | None
    ) -> list[HFTensor]:
        """The table of the model's tensors, which the files hold exactly."""
        if self._stored and quantization is None:
            raise UserError(
                f"{self.directory}: the checkpoint is quantized ({min(self._stored)}); pass load a "
                "matching quantization"
            )
        table = tensor_table(self._shapes(dtype, None))
        tied = self.config.tie_word_embeddings
        check_tensors(self.directory, self.tensors, table, tied, self._stored)
        return table

    def _shapes(
        self,
        dtype: jnp.dtype | str,
        quantization: BitsAndBytesConfig | None,
        rope_factors: RopeFactors = "by_text",
    ) -> Phi3:
        """The model that `load` fills, shapes and dtypes only; cached, so do not modify it."""
        key = (jnp.dtype(dtype), quantization, rope_factors)
        if key not in self._abstract:
            if quantization is None:
                config = self.config.with_rope_factors(rope_factors)
                self._abstract[key] = abstract_model(config, dtype)
            else:
                plain = self._shapes(dtype, None, rope_factors)
                self._abstract[key] = abstract_quantized(plain, quantization)
        return self._abstract[key]


def load(
    path_or_repo_id: str | Path,
    dtype: jnp.dtype | str = "float32",
    revision: str | None = None,
    mesh: Mesh | None = None,
    longrope_by_batch: bool = False,
    quantization: BitsAndBytesConfig | None = None,
    rope_factors: RopeFactors = "by_text",
) -> Phi3:
    """Load a Phi-3 checkpoint from a local HF folder or a hub id.

    Args:
        path_or_repo_id: a folder with config.json and `*.safetensors` (one file, or shards with
            their index), or a hub id.
        dtype: dtype of the loaded weights, whatever float type the files hold.
        revision: branch, tag or commit of a hub id.
        mesh: the mesh to shard the weights over, by the rules in `phi3_jax.sharding.rules`; each
            process reads only what its own devices hold. By default everything goes to the first
            device.
        longrope_by_batch: the same as `rope_factors="by_batch"`.
        quantization: a `lora_flax.BitsAndBytesConfig`; each weight is quantized as soon as it is
            read. A pre-quantized checkpoint needs the settings it was quantized with.
        rope_factors: how LongRoPE's factors are chosen, see `LongRope.choice`.

    Raises:
        UserError: not a Phi-3 checkpoint, or its tensors do not match its config; the message
            names the first ten missing, unexpected and misshapen tensors.
        lora_flax.LoraError: a weight that cannot be quantized as requested.
    """
    checkpoint = Checkpoint.open(path_or_repo_id, revision)
    if longrope_by_batch:
        rope_factors = "by_batch"
    return checkpoint._load(dtype, mesh, quantization, rope_factors)
