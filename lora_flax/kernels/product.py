"""A dense layer's product and its LoRA update as one, with its gradients.

`lora_matmul` is `x @ w + (dropout(x) @ A) * scale @ B`, with the kernels of
`lora_flax.kernels.lora`. The narrow products, with A and for A's gradient, stay with XLA.

On a mesh, each device runs the kernels on its own rows and its part of the weight. A weight that is
cut along its outputs needs no communication forward, and a sum over these devices backward; along
its inputs, the other way round.

Shapes: I inputs, O outputs, R columns of A over all slices, L layers of a stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec

from lora_flax.kernels.blocks import Platform
from lora_flax.kernels.lora import Added, gradients, matmul_add
from lora_flax.layers.dropout import drop

# Names for rematerialization policies: the narrow side of an update, and the layer's output, which
# a policy that keeps the results of matrix products cannot recognize in a kernel's.
NARROW, PRODUCT = "lora", "lora_matmul"

Axes = tuple[str, ...]


class Shards(NamedTuple):
    """How a layer is cut over the axes of the mesh in context; an empty tuple where it is not.

    Attributes:
        rows: mesh axes of each axis of x but the last.
        inputs, outputs: mesh axes of the weight's sides. Other axes that cut the weight gather it.
        gathered: whether there are such axes.
    """

    rows: tuple[Axes, ...]
    inputs: Axes = ()
    outputs: Axes = ()
    gathered: bool = False


class How(NamedTuple):
    """How `lora_matmul` runs: where, cut how (None on one device), and the rate of dropout."""

    platform: Platform
    shards: Shards | None = None
    rate: float = 0.0


class Operands(NamedTuple):
    """The arrays of one product.

    Attributes:
        x: `[..., I]`.
        weights: `[L, I, O]`, in x's dtype.
        layer: which of them is multiplied, int32.
        a: `[I, R]`, float32.
        b: `[R, O]`, float32; zero where a slice's rows meet another slice's columns.
        scale: float32 `[R]`.
        words: dropout's random words for x, uint32 `[..., 2]`; None without dropout.
    """

    x: jax.Array
    weights: jax.Array
    layer: jax.Array
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    words: jax.Array | None = None


# The operands with the narrow side `[..., R]`, and a value if the weights have a gradient.
Residuals = tuple[Operands, jax.Array, jax.Array | None]


def lora_matmul(operands: Operands, how: How) -> jax.Array:
    """`x @ w + (dropout(x) @ A) * scale @ B`, `[..., O]` in x's dtype.

    Rounded once, after the sum of both products; A's and B's gradients are float32.
    """
    y: jax.Array = _product(how, operands)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: How, operands: Operands) -> jax.Array:
    return _forward(how, operands)[0]


def _forward(how: How, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The product, and the narrow side before its scale, `[..., R]`."""
    x = operands.x
    with jax.named_scope("lora"):
        narrow = checkpoint_name(_dropped(how, operands) @ operands.a.astype(x.dtype), NARROW)
        h = _scaled(narrow, operands.scale)
    rows, inputs, outputs, _ = how.shards or Shards(())
    run = _on_mesh(
        how,
        _forward_local,
        (
            _spec(*rows, inputs),
            _spec((), inputs, outputs),
            _spec(),
            _spec(*rows, ()),
            _spec((), outputs),
        ),
        _spec(*rows, outputs),
    )
    y = run(x, operands.weights, operands.layer, h, operands.b.astype(x.dtype))
    return checkpoint_name(y, PRODUCT), narrow


def _forward_local(
    how: How, x: jax.Array, weights: jax.Array, index: jax.Array, h: jax.Array, b: jax.Array
) -> jax.Array:
    """The product on one device."""
    inputs = how.shards.inputs if how.shards else ()
    if inputs:  # the devices' products are summed, and the update must be in one of them
        h = jnp.where(jax.lax.axis_index(inputs) == 0, h, 0)
    y = matmul_add(_flat(x), weights, index, Added(_flat(h), b), how.platform)
    y = y.reshape(*x.shape[:-1], -1)
    return jax.lax.psum(y, inputs) if inputs else y


def _fwd(how: How, operands: Operands) -> tuple[jax.Array, Residuals]:
    primals: Any = operands  # of each array, with whether it has a gradient
    trained = jnp.zeros(()) if primals.weights.perturbed else None
    values: Operands = jax.tree.map(
        lambda primal: primal.value, operands, is_leaf=lambda a: isinstance(a, CustomVJPPrimal)
    )
    y, narrow = _forward(how, values)
    return y, (values, narrow, trained)


def _bwd(how: How, residuals: Residuals, dy: jax.Array | SymbolicZero) -> tuple[Operands]:
    operands, narrow, trained = residuals
    x = operands.x
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    with jax.named_scope("lora"):
        h = _scaled(narrow, operands.scale)
    rows, inputs, outputs, _ = how.shards or Shards(())
    narrow_spec = _spec(*rows, ())
    run = _on_mesh(
        how,
        _backward_local,
        (
            _spec(*rows, outputs),
            _spec((), inputs, outputs),
            _spec(),
            narrow_spec,
            _spec(inputs, ()),
            _spec((), outputs),
            _spec(),
            narrow_spec,
        ),
        (_spec(*rows, inputs), narrow_spec, _spec((), outputs)),
    )
    a, b = operands.a.astype(x.dtype), operands.b.astype(x.dtype)
    dx, g, db = run(dy, operands.weights, operands.layer, h, a, b, operands.scale, operands.words)
    with jax.named_scope("lora"):
        da = _summed(_dropped(how, operands), g)
    dw = None
    if trained is not None:
        own = _summed(x, dy).astype(x.dtype)
        dw = jnp.zeros_like(operands.weights).at[operands.layer].set(own)
    cotangents: list[Any] = [dx, dw, None, da, db, None, None]
    return (Operands(*cotangents),)


_product.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _backward_local(
    how: How,
    dy: jax.Array,
    weights: jax.Array,
    index: jax.Array,
    h: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    words: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x and of the narrow side `[..., R]`, and of b `[R, O]`, on one device."""
    rows, inputs, outputs, _ = how.shards or Shards(())
    with jax.named_scope("lora"):
        g, db = gradients(_flat(dy), b, _flat(h), how.platform)
        g = _scaled(g, scale)
    start = jax.lax.axis_index(inputs) * weights.shape[1] if inputs else 0
    added = Added(g, a, None if words is None else _flat(words), how.rate, start)
    dx = matmul_add(_flat(dy), weights, index, added, how.platform, transposed=True)
    dx, g = (array.reshape(*dy.shape[:-1], -1) for array in (dx, g))
    if outputs:
        dx, g = jax.lax.psum((dx, g), outputs)
    over = [axis for axes in rows for axis in axes]
    return dx, g, jax.lax.psum(db, over) if over else db


def _on_mesh(
    how: How, function: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function(how, ...)` on each device of the mesh in context, or on the only one."""
    local = functools.partial(function, how)
    if how.shards is None:
        return local
    mapped: Callable[..., Any] = jax.shard_map(
        local, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped


def _spec(*axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(names or None for names in axes))


def _dropped(how: How, operands: Operands) -> jax.Array:
    if operands.words is None:
        return operands.x
    with jax.named_scope("dropout"):
        return drop(operands.x, operands.words, how.rate)


def _scaled(narrow: jax.Array, scale: jax.Array) -> jax.Array:
    return (narrow.astype(jnp.float32) * scale).astype(narrow.dtype)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _summed(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x.T @ y` over all leading axes, float32."""
    leading = tuple(range(x.ndim - 1))
    product: jax.Array = jax.lax.dot_general(
        x, y, ((leading, leading), ((), ())), preferred_element_type=jnp.float32
    )
    return product
