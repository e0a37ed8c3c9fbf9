"""Fill an abstract model with a checkpoint's weights.

Loading works tensor by tensor: it reads the part of a tensor each device needs, sends it there, and
transposes and converts it into the stack in place. The host never holds more than a few copies of
the largest tensor, plus the model itself when the host is the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lora_flax import QuantizedArray
from phi3_jax.checkpoint.bitsandbytes import is_part, read_quantized
from phi3_jax.checkpoint.index import Index
from phi3_jax.checkpoint.names import HFTensor
from phi3_jax.errors import UserError, at_most_ten
from phi3_jax.model.network import Phi3
from phi3_jax.sharding.rules import shardings_at, spec_of

# A parameter's value, whole or of one layer of a stack.
Value = jax.Array | QuantizedArray

FLOAT_TYPES = ("F32", "BF16", "F16")
# Rotary tables in old checkpoints; the config determines them.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


def check_tensors(
    directory: Path, index: Index, table: list[HFTensor], tied: bool, stored: set[str]
) -> None:
    """Check that a checkpoint has the tensors of its network, using only the files' headers.

    Args:
        directory: the checkpoint folder, for the error message.
        index: the tensors it holds.
        table: the tensors it should hold.
        tied: whether the head is the embedding; some checkpoints store it twice.
        stored: names of the tensors that the files hold quantized.

    Raises:
        UserError: the message names the first ten missing, unexpected and misshapen tensors.
    """
    expected = {tensor.name: tensor.shape for tensor in table}
    ignored = {"lm_head.weight"} if tied else set()
    problems = [f"missing: {name}" for name in expected if name not in index]
    for name, found in index.items():
        if name.endswith(IGNORED_SUFFIX) or name in ignored or is_part(name, stored):
            continue
        if name in stored and name in expected:
            continue  # its shape and dtype differ; its quantization state gives them
        shape = list(found.shape)
        if name not in expected:
            problems.append(f"unexpected: {name} {shape}")
        elif found.shape != expected[name]:
            problems.append(f"{name}: shape {shape}, config.json expects {list(expected[name])}")
        elif found.dtype not in FLOAT_TYPES:
            problems.append(
                f"{name}: dtype {found.dtype}, expected one of {', '.join(FLOAT_TYPES)}"
            )
    if problems:
        raise UserError(
            f"{directory}: the tensors do not match config.json:\n  "
            + "\n  ".join(at_most_ten(problems))
        )


def fill(
    abstract: Phi3,
    index: Index,
    table: list[HFTensor],
    stored: set[str],
    dtype: jnp.dtype,
    mesh: Mesh | None,
) -> Phi3:
    """A model with the shapes of `abstract` and the weights of the checkpoint.

    Args:
        abstract: the model to load, whose kernels may be quantized; left unchanged.
        index: the tensors of the checkpoint, which passed `check_tensors`.
        table: their places in the network.
        stored: names of the tensors that the files hold quantized.
        dtype: dtype of the weights.
        mesh: where the weights go; None is the first device.

    Raises:
        UserError: a quantized tensor that does not match its layer, or values that are not finite.
    """
    finite: dict[str, jax.Array] = {}
    graphdef, state = nnx.split(abstract)
    state = jax.tree.map(lambda leaf: leaf, state)  # new variables, so `abstract` keeps its own
    flat = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    for path, tensors in _by_parameter(table):
        value = flat[path].get_value()
        shardings = _shardings(mesh, path, value)
        read = tensor_reader(index, stored, mesh, path, dtype, value, finite)
        flat[path].set_value(_assemble(tensors, shardings, read))
    require_finite(index, finite, dtype)
    model: Phi3 = nnx.merge(graphdef, state)
    return model


def _shardings(mesh: Mesh | None, path: tuple[str, ...], abstract: Any) -> Any:
    """The sharding of each array of a parameter's value."""
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    return shardings_at(path, abstract, mesh)


def tensor_reader(
    index: Index,
    stored: set[str],
    mesh: Mesh | None,
    path: tuple[str, ...],
    dtype: jnp.dtype,
    abstract: Any,
    finite: dict[str, jax.Array],
) -> Callable[[HFTensor], Value]:
    """A function that reads one tensor in the form in which the parameter at that path holds it.

    `stored` lists the tensors that are quantized in the files; whether the values of each tensor
    are finite is added to `finite`.
    """
    quantized = abstract if isinstance(abstract, QuantizedArray) else None

    def read(tensor: HFTensor) -> Value:
        file = index[tensor.name].file
        if tensor.name in stored:
            if quantized is None:
                raise UserError(
                    f"{file}: {tensor.name} is quantized; load it with a matching quantization"
                )
            found = read_quantized(index, tensor.name, tensor.shape, dtype)
            if found.scheme != quantized.scheme:
                raise UserError(
                    f"{file}: {tensor.name} is {found.scheme}, but the requested quantization "
                    f"is {quantized.scheme}"
                )
            on_device: QuantizedArray = jax.tree.map(jnp.asarray, found)
            finite[tensor.name] = _is_finite(on_device)
            return on_device
        if quantized is not None and stored:
            raise UserError(
                f"{file}: {tensor.name} is not quantized, but other weights here are; "
                "list its module in llm_int8_skip_modules, for all layers"
            )
        array: jax.Array = _convert(_read_onto(index, mesh, path, tensor), tensor.transpose, dtype)
        finite[tensor.name] = _is_finite(array)
        if quantized is None:
            return array
        packed: QuantizedArray = _quantize(array, quantized.kind, quantized.double)
        return packed

    return read


def _read_onto(
    index: Index, mesh: Mesh | None, path: tuple[str, ...], tensor: HFTensor
) -> jax.Array:
    """Read one tensor, in its file layout, onto the devices; each gets only the part it needs."""
    sharding: Sharding = SingleDeviceSharding(jax.devices()[0])
    if mesh is not None:
        shape = tensor.shape[::-1] if tensor.transpose else tensor.shape
        spec = tuple(spec_of(path, shape, mesh))
        sharding = NamedSharding(mesh, PartitionSpec(*spec[:: -1 if tensor.transpose else 1]))
    return jax.make_array_from_callback(tensor.shape, sharding, index[tensor.name].read)


def _assemble(tensors: list[HFTensor], shardings: Any, read: Callable[[HFTensor], Value]) -> Value:
    """The parameter's value: a single tensor, or the stack of all of them."""
    if tensors[0].layer is None:
        whole: Value = jax.tree.map(jax.device_put, read(tensors[0]), shardings)
        return whole
    stack: Value | None = None
    for tensor in tensors:
        value = read(tensor)
        if stack is None:
            stack = jax.tree.map(functools.partial(_zeros, len(tensors)), value, shardings)
        stack = _put(stack, value, jnp.int32(tensor.layer))
        # Otherwise dispatch runs ahead and keeps every pending tensor alive at once.
        jax.block_until_ready(stack)
    assert stack is not None
    return stack


def require_finite(index: Index, finite: dict[str, jax.Array], dtype: jnp.dtype) -> None:
    """Raise UserError that names the tensors whose flag, added by `tensor_reader`, is false."""
    bad = [name for name, flag in finite.items() if not flag]
    if not bad:
        return
    names = ", ".join(at_most_ten(bad))
    hint = "the file is damaged, or was saved from a diverged run"
    if dtype == jnp.float16:
        hint += "; or the values exceed float16's 65504, and model.dtype bfloat16 or float32 fits"
    raise UserError(f"{index[bad[0]].file}: values that are not finite in {names}: {hint}")


@jax.jit
def _is_finite(value: Value) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(value) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _zeros(count: int, one: jax.Array, sharding: Sharding) -> jax.Array:
    shape = (count, *one.shape)
    zeros: jax.Array = jax.jit(lambda: jnp.zeros(shape, one.dtype), out_shardings=sharding)()
    return zeros


# Two programs: when fused, XLA's CPU backend transposes a matrix eight times slower.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(array: jax.Array, transpose: bool, dtype: jnp.dtype) -> jax.Array:
    return (array.T if transpose else array).astype(dtype)


_quantize = jax.jit(QuantizedArray.quantize, static_argnums=(1, 2))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Value, value: Value, layer: jax.Array) -> Value:
    """Replace one layer of the stack, in place."""

    def put(stack: jax.Array, array: jax.Array) -> jax.Array:
        updated: jax.Array = jax.lax.dynamic_update_index_in_dim(stack, array, layer, axis=0)
        return updated

    replaced: Value = jax.tree.map(put, stack, value)
    return replaced


def _by_parameter(table: list[HFTensor]) -> Iterator[tuple[tuple[str, ...], list[HFTensor]]]:
    grouped: dict[tuple[str, ...], list[HFTensor]] = {}
    for tensor in table:
        grouped.setdefault(tensor.path, []).append(tensor)
    yield from grouped.items()
