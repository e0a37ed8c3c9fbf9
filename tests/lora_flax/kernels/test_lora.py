"""The fused kernels of LoRA, interpreted, against the plain form."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_flax
from lora_flax import LoraConfig, LoraError, Shards
from lora_flax.fused_lora import plain_matmul
from lora_flax.kernels import lora as kernels
from lora_flax.kernels.product import How, Operands, lora_matmul
from lora_flax.layers.dropout import random_words
from tests.lora_flax.quant.test_layer import Dense, Stack

INTERPRETED = "tpu_interpreted"


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def operands_of(rows, inputs, outputs, rank, dtype=jnp.float32, words=False, stack=1):
    lead = rows if isinstance(rows, tuple) else (rows,)
    return Operands(
        normal(0, (*lead, inputs), dtype),
        normal(1, (stack, inputs, outputs), dtype) / 10,
        jnp.int32(stack - 1),
        normal(2, (inputs, rank)) / 10,
        normal(3, (rank, outputs)),
        jnp.linspace(0.5, 2, rank),
        random_words(jax.random.key(4), lead) if words else None,
    )


def values_of(run, operands):
    """The product, and the gradients of x, A, B and the weight."""

    def product(x, a, b, weights):
        own = operands._replace(x=x, a=a, b=b, weights=weights)
        return run(own)

    y, pull = jax.vjp(product, operands.x, operands.a, operands.b, operands.weights)
    return y, *pull(normal(5, y.shape, y.dtype))


def assert_close(found, wanted, bound):
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    found, wanted = (np.asarray(a, np.float32) for a in (found, wanted))
    assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank", "words"),
    [
        (37, 128, 256, 1, False),
        ((3, 50), 512, 384, 8, True),
        (70, 1024, 128, 16, True),
        (64, 128, 128, 64, False),
        (20, 128, 128, 150, True),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_and_all_gradients(rows, inputs, outputs, rank, words, dtype, monkeypatch):
    """Several blocks along each side, and rows that do not fill the last one."""
    monkeypatch.setattr(kernels, "ROWS", 32)
    monkeypatch.setattr(kernels, "COLUMNS", 128)
    monkeypatch.setattr(kernels, "DEPTH_BYTES", 1024)
    operands = operands_of(rows, inputs, outputs, rank, dtype, words, stack=3)
    rate = 0.3 if words else 0.0
    found = values_of(functools.partial(lora_matmul, how=How(INTERPRETED, None, rate)), operands)
    wanted = values_of(functools.partial(plain_matmul, rate=rate), operands)
    for own, plain in zip(found, wanted, strict=True):
        # The plain form rounds both products to bfloat16 before it adds them.
        assert_close(own, plain, 2e-6 if dtype == jnp.float32 else 2**-6)


@pytest.mark.parametrize("cut", ["inputs", "outputs"])
def test_on_a_mesh(cut):
    """Rows over two axes, the weight cut along one side and gathered along the other."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    shards = Shards((("data", "fsdp"), ()), **{cut: ("tensor",)}, gathered=True)
    operands = operands_of((4, 40), 256, 256, 8, words=True)
    plain = functools.partial(plain_matmul, rate=0.3)
    wanted = jax.jit(functools.partial(values_of, plain))(operands)
    weight = (None, "tensor", "fsdp") if cut == "inputs" else (None, "fsdp", "tensor")
    specs = Operands(
        (("data", "fsdp"),), weight, (), (weight[1], None), (None, weight[2]), (), ((),)
    )
    placed = Operands(
        *(
            jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
            for array, spec in zip(operands, specs, strict=True)
        )
    )
    run = functools.partial(lora_matmul, how=How(INTERPRETED, shards, 0.3))
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(values_of, run))(placed)
    for own, other in zip(found, wanted, strict=True):
        assert_close(own, other, 2e-6)


def test_the_blocks_that_a_shape_gets():
    rows = {(rows, kernels._row_block(rows, 1024)) for rows in (1, 100, 2304, 3968, 4096)}
    assert rows == {(1, 16), (100, 112), (2304, 768), (3968, 992), (4096, 1024)}
    sizes = {(size, kernels._block(size, 1024)) for size in (128, 3072, 7680, 17920, 1152)}
    assert sizes == {(128, 128), (3072, 1024), (7680, 768), (17920, 512), (1152, 384)}


def fused_and_plain(model, config, run):
    """Values of `run(model, key)` with the gradients of what trains, by kernels and without."""
    lora_flax.wrap(model, config, rngs=nnx.Rngs(0))
    trains = lora_flax.mark_only_lora_as_trainable(model)
    every = []
    for fused in (False, True):
        if fused:
            lora_flax.use_fused_lora(model, INTERPRETED)
        graphdef, adapter, rest = nnx.split(model, trains, ...)

        def loss(adapter, graphdef=graphdef, rest=rest):
            y = run(nnx.merge(graphdef, adapter, rest))
            return (y.astype(jnp.float32) ** 2).sum(), y

        traced = jax.jit(jax.grad(loss, has_aux=True)).trace(adapter)
        assert ("pallas_call" in str(traced.jaxpr)) == fused
        every.append(jax.tree.leaves(traced.lower().compile()(adapter)))
    return every


X = normal(7, (2, 70, 128))
BASE = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0.2},
        {"use_rslora": True, "r": 9},
        {"target_modules": ["q_proj", "v_proj"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_a_layer(settings):
    model = nnx.Dict(qkv_proj=Dense((128, 256), nnx.Rngs(0)))
    model.qkv_proj.slices = (("q_proj", 128), ("k_proj", 64), ("v_proj", 64))
    config = LoraConfig(**BASE | settings)
    key = jax.random.key(3)
    plain, fused = fused_and_plain(model, config, lambda model: model.qkv_proj(X, key=key))
    for found, wanted in zip(fused, plain, strict=True):
        assert_close(found, wanted, 2e-6)


def test_a_layer_with_a_bias():
    model = nnx.Dict(layer=nnx.Linear(128, 128, rngs=nnx.Rngs(0)))
    model.layer.bias.set_value(jnp.arange(128.0))
    plain, fused = fused_and_plain(model, LoraConfig(**BASE), lambda model: model.layer(X))
    for found, wanted in zip(fused, plain, strict=True):
        assert_close(found, wanted, 2e-6)


def test_a_stack_under_scan_and_remat():
    model = Stack(128, 256, depth=2)
    plain, fused = fused_and_plain(model, LoraConfig(**BASE), lambda model: model(X))
    for found, wanted in zip(fused, plain, strict=True):
        assert_close(found, wanted, 1e-5)
    lora_flax.merge(model)
    assert_close(model(X), plain[-1], 1e-4)
    lora_flax.unmerge(model)
    few = X[:1, :9]
    assert "pallas_call" not in str(jax.make_jaxpr(lambda x: model(x))(few))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora or lora_bias"),
        ({"lora_bias": True}, "use_dora or lora_bias"),
        ({"r": 257}, "rank 257 is above 256"),
        ({}, "64 inputs and 128 outputs are not multiples of 128"),
    ],
)
def test_layers_that_keep_the_plain_form(settings, reason):
    sizes = (384, 384) if settings else (64, 128)
    model = nnx.Dict(layer=nnx.Linear(*sizes, rngs=nnx.Rngs(0)))
    lora_flax.wrap(model, LoraConfig(**BASE | settings), rngs=nnx.Rngs(0))
    with pytest.raises(LoraError, match=f"{reason}; use the plain form"):
        lora_flax.use_fused_lora(model, INTERPRETED)
    assert lora_flax.time_fused_lora(model, INTERPRETED, 128, jnp.float32) is None


def test_bases_and_adapters_that_keep_the_plain_form():
    model = nnx.Dict(layer=Dense((128, 128), nnx.Rngs(0)))
    config = LoraConfig(**BASE)
    with pytest.raises(LoraError, match="no dense layers with LoRA"):
        lora_flax.use_fused_lora(model, INTERPRETED)
    lora_flax.wrap(model, config, rngs=nnx.Rngs(0))
    lora_flax.use_fused_lora(model, INTERPRETED)
    lora_flax.add_adapter(model, "second", config, nnx.Rngs(1))
    lora_flax.set_adapter(model, ["default", "second"])

    def fused(x):
        return "pallas_call" in str(jax.make_jaxpr(lambda x: model.layer(x))(x))

    assert not fused(X)
    with pytest.raises(LoraError, match="2 active adapters"):
        lora_flax.use_fused_lora(model, INTERPRETED)
    lora_flax.set_adapter(model, "second")
    assert fused(X) and not fused(X.astype(jnp.bfloat16))
    lora_flax.quantize(model, lora_flax.BitsAndBytesConfig(load_in_8bit=True))
    assert not fused(X)
    with pytest.raises(LoraError, match="quantized or trained in full"):
        lora_flax.use_fused_lora(model, INTERPRETED)


def test_the_forms_are_timed():
    model = nnx.Dict(layer=nnx.Linear(128, 128, rngs=nnx.Rngs(0)))
    lora_flax.wrap(model, LoraConfig(**BASE | {"lora_dropout": 0.1}), rngs=nnx.Rngs(0))
    choice = lora_flax.time_fused_lora(model, "tpu", 128, jnp.float32)
    assert choice.kernel == "xla" and choice.problem  # a kernel for TPUs, on a CPU
    assert str(choice).startswith("LoRA matmul of 128 rows: xla")
    assert model.layer.platform is None


@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.usefixtures("compiled_anew")  # the cache's programs for a TPU cannot be read without
@jax.default_matmul_precision("default")
def test_mosaic_compiles_the_kernels(rank):
    """For one v5e chip: Phi-3-mini's gate_up_proj with dropout, out of a stack, with gradients."""
    pytest.importorskip("libtpu", reason="the compiler for TPUs: pip install 'phi3-jax[tpu]'")
    from phi3_jax.planning.topology import devices_of

    sharding = jax.sharding.SingleDeviceSharding(devices_of("v5e:1x1")[0])
    shapes = jax.eval_shape(
        lambda: operands_of((1, 4096), 3072, 16384, rank, jnp.bfloat16, words=True, stack=2)
    )
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )
    run = functools.partial(lora_matmul, how=How("tpu", None, 0.05))

    def step(operands):
        y, pull = jax.vjp(lambda x, a, b: run(operands._replace(x=x, a=a, b=b)), *arrays(operands))
        return y, pull(y)

    def arrays(operands):
        return operands.x, operands.a, operands.b

    compiled = jax.jit(step).lower(arguments).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    # Nothing the size of the weight is written: it is read out of its stack.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 3072 * 16384
