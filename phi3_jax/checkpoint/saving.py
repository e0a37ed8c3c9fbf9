"""Write a model as a Hugging Face folder, tensor by tensor.

One tensor at a time is brought back from the devices, so the host never holds more than a few
copies of the largest one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import lora_flax
from phi3_jax.checkpoint.abstract import abstract_model
from phi3_jax.checkpoint.index import INDEX_FILE
from phi3_jax.checkpoint.names import HFTensor, tensor_table
from phi3_jax.errors import UserError
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Dense, Phi3

_TYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save(model: Phi3, directory: str | Path, max_shard_size: int = 5 * 10**9) -> None:
    """Write config.json and safetensors that transformers' `Phi3ForCausalLM` can load.

    A model whose embedding and head were untied by merging is written with a separate head.

    Each file is written under a temporary name and renamed when complete, config.json last; an
    older one is removed first.

    Args:
        model: a model without wrappers; merge and unwrap LoRA first.
        directory: output folder; created if missing.
        max_shard_size: maximum bytes per file; a larger checkpoint is split, with an index.

    Raises:
        UserError: the model holds arrays that are not Phi-3 weights.
    """
    directory = Path(directory)
    model = nnx.merge(*nnx.split(model))  # shares the arrays; `untie` changes the modules
    untie(model)
    table = tensor_table(abstract_model(model.config))
    values = {
        tuple(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    known = {tensor.path for tensor in table}
    foreign = sorted(
        ".".join(path)
        for path, value in values.items()
        if path not in known or not isinstance(value, jax.Array)
    )
    if foreign:
        raise UserError(
            f"cannot save arrays that are not Phi-3 weights; merge and unwrap first: {foreign}"
        )
    dtype = np.dtype(model.model.norm.weight.dtype)
    arrays = (hf_array(tensor, values[tensor.path], dtype) for tensor in table)
    save_tensors(model.config, table, arrays, dtype, directory, max_shard_size)


def save_tensors(
    config: Phi3Config,
    table: list[HFTensor],
    arrays: Iterator[np.ndarray],
    dtype: np.dtype[Any],
    directory: Path,
    max_shard_size: int,
) -> None:
    """Write config.json and safetensors, from tensors that are produced one at a time.

    Args:
        config: the architecture.
        table: its tensors, in the order of `arrays`.
        arrays: the tensors.
        dtype: dtype of all tensors.
        directory: output folder; created if missing.
        max_shard_size: maximum bytes per file.

    Raises:
        UserError: a tensor is not finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Without it, a folder that a crash leaves with shards of two models would load as one.
    lora_flax.remove_durably(directory / "config.json")
    shards = _shards(table, dtype.itemsize, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        shapes = {tensor.name: tensor.shape for tensor in shard}
        own = map(_finite, shard, itertools.islice(arrays, len(shard)))
        write_tensors(directory / name, shapes, dtype, own)
        weight_map |= {tensor.name: name for tensor in shard}
    found = {path.name for path in directory.glob("model-*-of-*.safetensors")}
    for old in (found | {"model.safetensors"}) - {*weight_map.values()}:
        # Of an earlier model, which readers would mix with this one.
        (directory / old).unlink(missing_ok=True)
    (directory / INDEX_FILE).unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(int(np.prod(t.shape)) for t in table) * dtype.itemsize
        write_json(
            {"metadata": {"total_size": total}, "weight_map": weight_map}, directory / INDEX_FILE
        )
    write_json(config.to_hf() | {"torch_dtype": dtype.name}, directory / "config.json")


def _finite(tensor: HFTensor, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise UserError(
            f"{tensor.name}: values that are not finite in {array.dtype.name}, which are not "
            "written; if it is float16, use bfloat16 or float32, otherwise the adapter is too large"
        )
    return array


def untie(model: Phi3) -> None:
    """Make the config of a merged model, in place, agree with its embedding and head.

    The two halves of a `lora_flax.UntiedEmbedding` become `embed_tokens` and a separate `lm_head`,
    and `tie_word_embeddings` false. `vocab_size` is the embedding's number of rows, which an
    adapter with a resized embedding changes.
    """
    config, embedding = model.config, model.model.embed_tokens
    if isinstance(embedding, lora_flax.UntiedEmbedding):
        read: Any = embedding.head
        table: jax.Array = read.embedding[...]
        head = nnx.eval_shape(lambda: Dense(table.shape[::-1], 0.0, table.dtype, nnx.Rngs(0)))
        head.kernel.set_value(table.T)
        whole: Any = embedding.embedding
        whole.tied_head = None
        model.model.embed_tokens, model.lm_head = whole, head
        config = dataclasses.replace(config, tie_word_embeddings=False)
    weight = getattr(model.model.embed_tokens, "embedding", None)
    if weight is not None:
        config = dataclasses.replace(config, vocab_size=weight.shape[0])
    model.config = model.model.config = config


def hf_array(tensor: HFTensor, value: jax.Array, dtype: np.dtype) -> np.ndarray:
    """One HF tensor, on the host, from the whole value of the parameter that holds it."""
    value = value if tensor.layer is None else value[tensor.layer]
    return np.asarray((value.T if tensor.transpose else value).astype(dtype))


def write_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> None:
    """Write a safetensors file tensor by tensor, under a temporary name until complete.

    The library's `save_file` needs all tensors at once and copies each, so a 5 GB shard takes
    10 GB.

    Args:
        path: the file to write.
        shapes: shapes keyed by name, in the order of `tensors`.
        dtype: dtype of all tensors.
        tensors: the tensors, produced one at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": _TYPE_NAMES[dtype.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    pieces = (np.ascontiguousarray(tensor).view(np.uint8).data for tensor in tensors)
    beginning = len(text).to_bytes(8, "little") + text
    lora_flax.write_atomically(path, itertools.chain((beginning,), pieces))


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write indented JSON, under a temporary name until complete."""
    lora_flax.write_atomically(path, json.dumps(value, indent=2) + "\n")


def _shards(table: list[HFTensor], itemsize: int, limit: int) -> list[list[HFTensor]]:
    shards: list[list[HFTensor]] = [[]]
    size = 0
    for tensor in table:
        tensor_size = int(np.prod(tensor.shape)) * itemsize
        if shards[-1] and size + tensor_size > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor_size
    return shards
