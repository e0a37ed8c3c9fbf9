"""Convert Hugging Face safetensors to the network and back.

Module paths are HF's names, so conversion is one rule: a `kernel` is the transpose of HF's
`weight`, everything else is `weight` unchanged, and a stack of layers has one HF tensor per layer,
with the layer index after the stack's path:

    model.layers.self_attn.qkv_proj.kernel [L, in, out]
        <-> model.layers.{0 .. L-1}.self_attn.qkv_proj.weight [out, in]

Both directions work tensor by tensor. Loading reads the part of a tensor each device needs, sends
it there, and transposes and converts it into the stack in place; saving brings back one tensor at a
time. So the host never holds more than a few copies of the largest tensor, plus the model itself
when the host is the device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import safe_open

from lora_flax import QuantizedArray
from phi3_jax.checkpoint.bitsandbytes import is_part, quantized_tensors, read_quantized
from phi3_jax.checkpoint.folder import (
    INDEX_FILE,
    files_of_tensors,
    read_tensor,
    resolve,
    write_json,
    write_tensors,
)
from phi3_jax.errors import UserError
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3
from phi3_jax.sharding.rules import shardings_at, spec_of

# A parameter's value, whole or of one layer of a stack.
Value = jax.Array | QuantizedArray

FLOAT_TYPES = ("F32", "BF16", "F16")
# Rotary tables in old checkpoints; the config determines them.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


class Quantization(Protocol):
    """The interface of `lora_flax.BitsAndBytesConfig`; the network does not depend on it."""

    def quantize(self, model: nnx.Module) -> None:
        """Replace layers with ones whose kernel is a `lora_flax.QuantizedArray`."""


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


def tensor_table(config: Phi3Config) -> list[HFTensor]:
    """Every tensor of a checkpoint with this config, in network order."""
    abstract = nnx.eval_shape(lambda: Phi3(config, rngs=nnx.Rngs(0)))
    table = []
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        *module, leaf = (str(part) for part in path)
        stacked = module[:2] == ["model", "layers"]
        shape = variable.shape[1:] if stacked else variable.shape
        transpose = leaf == "kernel"
        for layer in range(config.num_hidden_layers) if stacked else (None,):
            index = [] if layer is None else [str(layer)]
            name = ".".join([*module[:2], *index, *module[2:], "weight"])
            hf_shape = shape[::-1] if transpose else shape
            table.append(HFTensor(name, hf_shape, (*module, leaf), layer, transpose))
    return table


def abstract_model(
    config: Phi3Config, dtype: jnp.dtype | str, quantization: Quantization | None = None
) -> Phi3:
    """A model with shapes and dtypes only."""

    def build() -> Phi3:
        model = Phi3(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
        if quantization is not None:
            quantization.quantize(model)
        return model

    return nnx.eval_shape(build)


def load(
    path_or_repo_id: str | Path,
    dtype: jnp.dtype | str = "float32",
    revision: str | None = None,
    mesh: Mesh | None = None,
    longrope_by_batch: bool = False,
    quantization: Quantization | None = None,
) -> Phi3:
    """Load a Phi-3 checkpoint from a local HF folder or a hub id.

    Args:
        path_or_repo_id: a folder with config.json and `*.safetensors` (one file, or shards with
            their index), or a hub id.
        dtype: dtype of the loaded weights, whatever float type the files hold.
        revision: branch, tag or commit of a hub id.
        mesh: the mesh to shard the weights over, by `phi3_jax.sharding.rules`; each
            process reads only what its own devices hold. By default everything goes to the first
            device.
        longrope_by_batch: see `LongRope.by_batch`.
        quantization: a `lora_flax.BitsAndBytesConfig`; each weight is quantized as soon as it is
            read. A pre-quantized checkpoint needs the settings it was made with.

    Raises:
        UserError: not a Phi-3 checkpoint, or its tensors do not match its config; the message
            names every missing, unexpected and misshapen tensor.
    """
    directory = resolve(path_or_repo_id, revision)
    config = Phi3Config.from_file(directory / "config.json")
    if longrope_by_batch and config.longrope is not None:
        config = dataclasses.replace(
            config, longrope=dataclasses.replace(config.longrope, by_batch=True)
        )
    dtype = jnp.dtype(dtype)
    files = files_of_tensors(directory)
    table = tensor_table(config)
    stored = quantized_tensors(files)
    if stored and quantization is None:
        raise UserError(
            f"{directory}: the checkpoint is quantized ({min(stored)}); give load a quantization "
            "of that kind"
        )
    _check_tensors(directory, files, table, config, stored)
    graphdef, state = nnx.split(abstract_model(config, dtype, quantization))
    flat = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    for path, tensors in _by_parameter(table):
        abstract = flat[path].get_value()
        shardings = _shardings(mesh, path, abstract)
        read = _reader(files, stored, mesh, path, dtype, abstract)
        flat[path].set_value(_assemble(tensors, shardings, read))
    return nnx.merge(graphdef, state)


def save(model: Phi3, directory: str | Path, max_shard_size: int = 5 * 10**9) -> None:
    """Write config.json and safetensors that transformers' `Phi3ForCausalLM` can load.

    Each file is written under a temporary name and renamed when complete, config.json last.

    Args:
        model: a model without wrappers; merge and unwrap LoRA first.
        directory: output folder; created if missing.
        max_shard_size: maximum bytes per file; a larger checkpoint is split, with an index.

    Raises:
        UserError: the model holds arrays that are not Phi-3 weights.
    """
    directory = Path(directory)
    table = tensor_table(model.config)
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
        raise UserError(f"cannot save: merge and unwrap first; no Phi-3 weights: {foreign}")
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(model.model.norm.weight.dtype)
    shards = _shards(table, dtype.itemsize, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        shapes = {tensor.name: tensor.shape for tensor in shard}
        arrays = (_hf_array(tensor, values[tensor.path], dtype) for tensor in shard)
        write_tensors(directory / name, shapes, dtype, arrays)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(int(np.prod(t.shape)) for t in table) * dtype.itemsize
        write_json(
            {"metadata": {"total_size": total}, "weight_map": weight_map}, directory / INDEX_FILE
        )
    write_json(model.config.to_hf() | {"torch_dtype": dtype.name}, directory / "config.json")


def _shardings(mesh: Mesh | None, path: tuple[str, ...], abstract: Any) -> Any:
    """The sharding of each array of a parameter's value."""
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    return shardings_at(path, abstract, mesh)


def _reader(
    files: dict[str, Path],
    stored: set[str],
    mesh: Mesh | None,
    path: tuple[str, ...],
    dtype: jnp.dtype,
    abstract: Any,
) -> Callable[[HFTensor], Value]:
    """A function that reads one tensor as the parameter at that path holds it.

    `stored` lists the tensors that are quantized in the files.
    """
    quantized = abstract if isinstance(abstract, QuantizedArray) else None

    def read(tensor: HFTensor) -> Value:
        file = files[tensor.name]
        if tensor.name in stored:
            if quantized is None:
                raise UserError(
                    f"{file}: {tensor.name} is quantized; load it with a quantization of its kind"
                )
            found = read_quantized(files, tensor.name, tensor.shape, dtype)
            if found.scheme != quantized.scheme:
                raise UserError(
                    f"{file}: {tensor.name} is {found.scheme}, the quantization asked for is "
                    f"{quantized.scheme}"
                )
            return jax.tree.map(jnp.asarray, found)
        if quantized is not None and stored:
            raise UserError(
                f"{file}: {tensor.name} is not quantized as others here are; "
                "name it in llm_int8_skip_modules, for all layers alike"
            )
        array = _convert(_read_onto(files, mesh, path, tensor), tensor.transpose, dtype)
        return array if quantized is None else _quantize(array, quantized.kind, quantized.double)

    return read


def _read_onto(
    files: dict[str, Path], mesh: Mesh | None, path: tuple[str, ...], tensor: HFTensor
) -> jax.Array:
    """Read one tensor, in its file layout, onto the devices; each gets only the part it needs."""
    sharding: Sharding = SingleDeviceSharding(jax.devices()[0])
    if mesh is not None:
        shape = tensor.shape[::-1] if tensor.transpose else tensor.shape
        spec = tuple(spec_of(path, shape, mesh))
        sharding = NamedSharding(mesh, PartitionSpec(*spec[:: -1 if tensor.transpose else 1]))
    file = files[tensor.name]
    return jax.make_array_from_callback(
        tensor.shape, sharding, lambda index: read_tensor(file, tensor.name, index)
    )


def _assemble(tensors: list[HFTensor], shardings: Any, read: Callable[[HFTensor], Value]) -> Value:
    """The value that these tensors form: one of them, or a stack of all."""
    if tensors[0].layer is None:
        return jax.tree.map(jax.device_put, read(tensors[0]), shardings)
    stack = None
    for tensor in tensors:
        value = read(tensor)
        if stack is None:
            stack = jax.tree.map(functools.partial(_zeros, len(tensors)), value, shardings)
        stack = _put(stack, value, jnp.int32(tensor.layer))
        # Otherwise dispatch runs ahead and keeps every pending tensor alive at once.
        jax.block_until_ready(stack)
    assert stack is not None
    return stack


def _zeros(count: int, one: jax.Array, sharding: Sharding) -> jax.Array:
    shape = (count, *one.shape)
    return jax.jit(lambda: jnp.zeros(shape, one.dtype), out_shardings=sharding)()


def _converted(array: jax.Array, transpose: bool, dtype: jnp.dtype) -> jax.Array:
    return (array.T if transpose else array).astype(dtype)


# Two programs: when fused, XLA's CPU backend transposes a matrix eight times slower.
_convert = jax.jit(_converted, static_argnums=(1, 2))
_quantize = jax.jit(QuantizedArray.quantize, static_argnums=(1, 2))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Value, value: Value, layer: jax.Array) -> Value:
    """Replace one layer of the stack, in place."""

    def put(stack: jax.Array, array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, array, layer, axis=0)

    return jax.tree.map(put, stack, value)


def _check_tensors(
    directory: Path,
    files: dict[str, Path],
    table: list[HFTensor],
    config: Phi3Config,
    stored: set[str],
) -> None:
    expected = {tensor.name: tensor.shape for tensor in table}
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems = [f"missing: {name}" for name in expected if name not in files]
    for name, file in files.items():
        if name.endswith(IGNORED_SUFFIX) or name in ignored or is_part(name, stored):
            continue
        if name in stored and name in expected:
            continue  # different shapes and dtypes, given by its own state
        with safe_open(file, "np") as reader:
            part = reader.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if name not in expected:
            problems.append(f"not part of the network: {name} {list(shape)}")
        elif shape != expected[name]:
            problems.append(f"{name}: shape {list(shape)}, config.json asks {list(expected[name])}")
        elif dtype not in FLOAT_TYPES:
            problems.append(f"{name}: type {dtype}, one of {', '.join(FLOAT_TYPES)} is needed")
    if problems:
        raise UserError(
            f"{directory}: the tensors do not fit config.json:\n  " + "\n  ".join(problems)
        )


def _by_parameter(table: list[HFTensor]) -> Iterator[tuple[tuple[str, ...], list[HFTensor]]]:
    grouped: dict[tuple[str, ...], list[HFTensor]] = {}
    for tensor in table:
        grouped.setdefault(tensor.path, []).append(tensor)
    yield from grouped.items()


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


def _hf_array(tensor: HFTensor, value: jax.Array, dtype: np.dtype) -> np.ndarray:
    value = value if tensor.layer is None else value[tensor.layer]
    return np.asarray(_converted(value, tensor.transpose, dtype))
