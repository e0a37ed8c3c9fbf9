"""Hugging Face safetensors to the network and back.

Module paths are HF's names, so the conversion table is one rule: a `kernel` is the transpose of
HF's `weight`, everything else is `weight` as it is, and a stack of layers has one HF tensor per
layer, its index after the stack's path:

    model.layers.self_attn.qkv_proj.kernel [L, in, out]
        <-> model.layers.{0 .. L-1}.self_attn.qkv_proj.weight [out, in]
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from phi3_jax.config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.model import Phi3

FLOAT_TYPES = ("F32", "BF16", "F16")
INDEX_FILE = "model.safetensors.index.json"
# Rotary tables that old checkpoints carry; they follow from the config.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of an HF checkpoint and its place in the network.

    Attributes:
        name: HF's name.
        shape: HF's shape.
        path: of the NNX parameter that holds it.
        layer: its index in a stacked parameter; None for a single one.
        transpose: whether the parameter holds the transpose.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None
    transpose: bool


def tensor_table(config: Phi3Config) -> list[HFTensor]:
    """Every tensor of a checkpoint of this shape, in the order of the network."""
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


def load(
    path_or_repo_id: str | Path,
    dtype: jnp.dtype | str = "float32",
    revision: str | None = None,
) -> Phi3:
    """Load a Phi-3 checkpoint from a local HF folder or a hub id.

    Args:
        path_or_repo_id: a folder with config.json and `*.safetensors` (one file, or shards with
            their index), or a hub id.
        dtype: of the loaded weights, whatever float type the files hold.
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: not a Phi-3 checkpoint, or one whose tensors do not fit its config; every
            missing, left-over and misshapen tensor is named.
    """
    directory = resolve(path_or_repo_id, revision)
    config = Phi3Config.from_file(directory / "config.json")
    dtype = jnp.dtype(dtype)
    files = _files_of_tensors(directory)
    table = tensor_table(config)
    _check_tensors(directory, files, table, config)

    abstract = nnx.eval_shape(lambda: Phi3(config, rngs=nnx.Rngs(0), dtype=dtype))
    graphdef, state = nnx.split(abstract)
    flat = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    for path, arrays in _by_parameter(table):
        value = np.empty(flat[path].shape, dtype)
        for tensor in arrays:
            array = _read(files[tensor.name], tensor.name)
            value[... if tensor.layer is None else tensor.layer] = (
                array.T if tensor.transpose else array
            )
        flat[path].set_value(jnp.asarray(value))
    return nnx.merge(graphdef, state)


def save(model: Phi3, directory: str | Path, max_shard_size: int = 5 * 10**9) -> None:
    """Write config.json and safetensors that transformers' `Phi3ForCausalLM` loads.

    Each file is written under a temporary name and renamed when whole, config.json last.

    Args:
        model: without wrappers; merge and unwrap LoRA first.
        directory: made if absent.
        max_shard_size: bytes; a larger checkpoint is split, with an index.

    Raises:
        UserError: the model still holds something that is no Phi-3 weight.
    """
    directory = Path(directory)
    table = tensor_table(model.config)
    values = {
        tuple(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    foreign = sorted(".".join(path) for path in values.keys() - {t.path for t in table})
    if foreign:
        raise UserError(f"cannot save: merge and unwrap first; no Phi-3 weights: {foreign}")
    directory.mkdir(parents=True, exist_ok=True)
    itemsize = np.dtype(model.model.norm.weight.dtype).itemsize
    shards = _shards(table, itemsize, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        _save_tensors({t.name: _hf_array(t, values[t.path]) for t in shard}, directory / name)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(int(np.prod(t.shape)) for t in table) * itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(index, directory / INDEX_FILE)
    dtype = str(model.model.norm.weight.dtype)
    _write_json(model.config.to_hf() | {"torch_dtype": dtype}, directory / "config.json")


def resolve(path_or_repo_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: itself, or a hub id's snapshot in the hub cache.

    From the hub only safetensors, JSON, chat templates and tokenizer files are fetched: no pickle,
    no code.

    Raises:
        UserError: neither a folder nor a model that the hub gives.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo_id)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: no such folder, and not to be had from the hub "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from None


def fingerprint(directory: str | Path) -> str:
    """A digest that names a base model without reading all of it.

    Over config.json and, per tensor, its name, type, shape and first and last 1,024 values' bytes.
    Equal weights in other shards give the same digest.
    """
    directory = Path(directory)
    digest = hashlib.sha256(
        json.dumps(Phi3Config.from_file(directory / "config.json").to_hf(), sort_keys=True).encode()
    )
    for name, file in sorted(_files_of_tensors(directory).items()):
        with safe_open(file, "np") as reader:
            part = reader.get_slice(name)
            digest.update(f"{name} {part.get_dtype()} {part.get_shape()}".encode())
            rows = part.get_shape()[0]
            for edge in (part[:1], part[rows - 1 :]):
                flat = np.ascontiguousarray(edge).reshape(-1)
                digest.update(flat[:1024].tobytes() + flat[-1024:].tobytes())
    return digest.hexdigest()


def _files_of_tensors(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = directory / INDEX_FILE
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{index}: not a safetensors index") from None
        files = {directory / name for name in weight_map.values()}
        if missing := sorted(file.name for file in files if not file.exists()):
            raise UserError(f"{directory}: {INDEX_FILE} names shards that are missing: {missing}")
    else:
        files = set(directory.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{directory}: no *.safetensors there; a checkpoint in another format must be "
                "saved as safetensors first (transformers: save_pretrained)"
            )
    found: dict[str, Path] = {}
    for file in sorted(files):
        try:
            with safe_open(file, "np") as reader:
                found |= dict.fromkeys(reader.keys(), file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or not a safetensors file ({error})") from None
    return found


def _check_tensors(
    directory: Path, files: dict[str, Path], table: list[HFTensor], config: Phi3Config
) -> None:
    expected = {tensor.name: tensor.shape for tensor in table}
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems = [f"missing: {name}" for name in expected if name not in files]
    for name, file in files.items():
        if name.endswith(IGNORED_SUFFIX) or name in ignored:
            continue
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


def _read(file: Path, name: str) -> np.ndarray:
    with safe_open(file, "np") as reader:
        return reader.get_tensor(name)


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


def _hf_array(tensor: HFTensor, value: jax.Array) -> np.ndarray:
    array = np.asarray(value if tensor.layer is None else value[tensor.layer])
    return np.ascontiguousarray(array.T if tensor.transpose else array)


def _save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def _write_json(value: dict, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
