"""`LoRADense` against loralib and PEFT on the same weights."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import loralib
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lora_flax
from lora_flax import LoraConfig, LoRADense
from lora_flax.layers.adapter import product
from tests.lora_flax.nets import Dense

IN, OUT, R, ALPHA = 7, 9, 3, 5


def layer(config: LoraConfig, base: nnx.Module | None = None, seed: int = 0) -> LoRADense:
    """A wrapped layer with A and B away from their start."""
    base = nnx.Linear(IN, OUT, rngs=nnx.Rngs(seed)) if base is None else base
    wrapped = start(base, config, seed + 1)
    rng = np.random.default_rng(seed)
    for part in (update(wrapped).lora_A, update(wrapped).lora_B):
        part.set_value(jnp.asarray(rng.normal(size=part.get_value().shape), jnp.float32))
    return wrapped


class Model(nnx.Module):
    """Holds one layer, or a stack of them."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer
        kernel = layer.kernel[...]
        self.stack_size = kernel.shape[0] if kernel.ndim == 3 else None


def start(base: nnx.Module, config: LoraConfig, seed: int = 1) -> LoRADense:
    """A wrapped layer as it starts."""
    model = Model(base)
    lora_flax.wrap(model, dataclasses.replace(config, target_modules=["layer"]), nnx.Rngs(seed))
    return model.layer


def update(wrapped: LoRADense) -> lora_flax.Adapter:
    return wrapped.adapters["default"]


def inputs(rows: int = 4) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(rows, IN)).astype(np.float32)


def loralib_twin(ours: LoRADense) -> loralib.Linear:
    config = update(ours).spec.config
    twin = loralib.Linear(IN, OUT, r=config.r, lora_alpha=config.lora_alpha)
    set_weights(twin.weight, twin.bias, twin.lora_A, twin.lora_B, ours)
    twin.train()  # loralib's train() returns nothing
    return twin


def peft_twin(ours: LoRADense) -> torch.nn.Module:
    config = update(ours).spec.config
    net = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    twin = peft.get_peft_model(
        net,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            target_modules=["0"],
        ),
    ).base_model.model[0]
    a, b = twin.lora_A["default"].weight, twin.lora_B["default"].weight
    set_weights(twin.base_layer.weight, twin.base_layer.bias, a, b, ours)
    return twin


def set_weights(weight, bias, a, b, ours: LoRADense) -> None:
    with torch.no_grad():
        weight.copy_(torch.tensor(np.array(ours.base.kernel[...].T)))
        bias.copy_(torch.tensor(np.array(ours.base.bias[...])))
        a.copy_(torch.tensor(np.array(update(ours).lora_A[...].T)))
        b.copy_(torch.tensor(np.array(update(ours).lora_B[...].T)))


def gradients(ours: LoRADense, x: np.ndarray) -> nnx.State:
    graphdef, update, rest = nnx.split(ours, nnx.LoRAParam, ...)

    def loss(update):
        return (nnx.merge(graphdef, update, rest)(x) ** 2).sum()

    return jax.grad(loss)(update)


@pytest.mark.parametrize("library", ["loralib", "peft", "peft-rslora"])
def test_forward_gradients_and_merged_weight(library):
    config = LoraConfig(r=R, lora_alpha=ALPHA, use_rslora=library == "peft-rslora")
    ours = layer(config)
    twin = loralib_twin(ours) if library == "loralib" else peft_twin(ours)
    x = inputs()

    theirs = twin(torch.tensor(x))
    np.testing.assert_allclose(ours(x), theirs.detach().numpy(), rtol=1e-5, atol=1e-5)

    (theirs**2).sum().backward()
    grads = gradients(ours, x)
    a, b = (twin.lora_A, twin.lora_B) if library == "loralib" else (
        twin.lora_A["default"].weight,
        twin.lora_B["default"].weight,
    )  # fmt: skip
    grads = grads["adapters"]["default"]
    for grad, parameter in ((grads["lora_A"], a), (grads["lora_B"], b)):
        expected = parameter.grad.numpy().T
        distance = np.linalg.norm(grad[...] - expected) / np.linalg.norm(expected)
        assert distance < 1e-5

    if library == "loralib":
        twin.eval()  # merges
        merged = twin.weight
    else:
        twin.merge()
        merged = twin.base_layer.weight
    ours.merge()
    expected = merged.detach().numpy().T
    np.testing.assert_allclose(ours.base.kernel[...], expected, rtol=1e-5, atol=1e-5)


def test_start_is_that_of_loralib_and_peft():
    """A uniform in +-1/sqrt(in), of one layer in a stack too; B zero."""
    wide, r = 400, 32
    stacked = update(start(Dense((5, wide, 8 * r), rngs=nnx.Rngs(0)), LoraConfig(r=r))).lora_A[...]
    reference = loralib.Linear(wide, 8, r=r).lora_A.detach().numpy()
    torch_peft = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(wide, 8)),
        peft.LoraConfig(r=r, target_modules=["0"]),
    ).base_model.model[0]
    peft_a = torch_peft.lora_A["default"].weight.detach().numpy()
    for member in stacked:
        assert member.std() == pytest.approx(reference.std(), rel=0.03)
        assert member.std() == pytest.approx(peft_a.std(), rel=0.03)
        assert abs(member).max() <= 1 / np.sqrt(wide)
    assert len({float(member[0, 0]) for member in stacked}) == 5
    b = update(start(Dense((wide, 8), rngs=nnx.Rngs(0)), LoraConfig(r=4))).lora_B
    assert not b[...].any()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    features_in=st.integers(1, 9),
    features_out=st.integers(1, 9),
    r=st.integers(1, 9),
    alpha=st.floats(0.1, 64),
    data=st.data(),
)
def test_forward_is_that_of_the_merged_kernel(features_in, features_out, r, alpha, data):
    """Also for a stack, member by member."""
    members = data.draw(st.integers(1, 3))
    base = Dense((members, features_in, features_out), rngs=nnx.Rngs(0))
    assume(r <= min(features_in, features_out))
    config = LoraConfig(r=r, lora_alpha=alpha)
    ours = layer(config, base)
    kernel = base.kernel[...] + update(ours).delta()
    x = np.random.default_rng(2).normal(size=(4, features_in)).astype(np.float32)
    graphdef, state = nnx.split(ours)
    for index in range(members):
        member = nnx.merge(graphdef, jax.tree.map(lambda a, i=index: a[i], state))
        np.testing.assert_allclose(member(x), x @ kernel[index], rtol=1e-3, atol=1e-3 * (1 + alpha))


def matmul_shapes(function, *args) -> set[tuple[int, ...]]:
    equations = jax.make_jaxpr(function)(*args).eqns
    dots = [equation for equation in equations if equation.primitive.name == "dot_general"]
    return {variable.aval.shape for equation in dots for variable in equation.outvars}


def test_the_update_is_never_a_full_matrix():
    """No matmul, forward or backward, gives an array of the kernel's shape."""
    ours = layer(LoraConfig(r=R))
    graphdef, update, rest = nnx.split(ours, nnx.LoRAParam, ...)

    def loss(update, rest, x):
        return (nnx.merge(graphdef, update, rest)(x) ** 2).sum()

    full = {(IN, OUT), (OUT, IN)}
    assert not full & matmul_shapes(jax.grad(loss), update, rest, inputs())
    # What the check would see: the gradient of the kernel.
    assert full & matmul_shapes(jax.grad(loss, argnums=1), update, rest, inputs())


def test_dropout_goes_by_key_and_only_into_the_update():
    ours = layer(LoraConfig(r=R, lora_dropout=0.5))
    x = inputs(64)
    one, same, other = (ours(x, key=jax.random.key(k)) for k in (0, 0, 1))
    assert (one == same).all() and not (one == other).all()
    plain = layer(LoraConfig(r=R))
    assert (ours(x) == plain(x)).all()
    assert (plain(x, key=jax.random.key(0)) == plain(x)).all()

    update(ours).lora_B.set_value(jnp.zeros_like(update(ours).lora_B[...]))
    assert (ours(x, key=jax.random.key(0)) == ours.base(x)).all()


def test_dropout_keeps_the_mean():
    ours = layer(LoraConfig(r=R, lora_dropout=0.4))
    x = inputs(2)
    keys = jax.random.split(jax.random.key(3), 4000)
    outputs = jax.vmap(lambda key: ours(x, key=key))(keys)
    spread = outputs.std(0) / np.sqrt(len(keys))
    assert (abs(outputs.mean(0) - ours(x)) < 5 * spread).all()


class Keyed(Dense):
    """Says which key it was called with."""

    def __call__(self, x, *, key=None):
        y = super().__call__(x)
        return y if key is None else y + jax.random.uniform(key, y.shape)


def test_the_base_gets_a_key_of_its_own():
    base = Keyed((IN, OUT), rngs=nnx.Rngs(0))
    key, x = jax.random.key(0), inputs()
    without = start(base, LoraConfig(r=2))
    assert (without(x, key=key) == base(x, key=key)).all()
    dropping = start(base, LoraConfig(r=2, lora_dropout=0.5))
    assert (dropping(x) == base(x)).all()
    base_key, _ = jax.random.split(key)
    assert (dropping(x, key=key) == base(x, key=base_key)).all()


def test_bfloat16_computes_in_bfloat16_and_keeps_a_and_b_in_float32():
    base = Dense((IN, OUT), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    ours = layer(LoraConfig(r=R), base)
    y = ours(jnp.asarray(inputs(), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert update(ours).lora_A[...].dtype == update(ours).lora_B[...].dtype == jnp.float32
    exact = inputs() @ (np.float32(base.kernel[...]) + np.array(update(ours).delta()))
    np.testing.assert_allclose(np.float32(y), exact, atol=0.1, rtol=0.05)

    before = base.kernel[...]
    ours.merge()
    assert base.kernel[...].dtype == jnp.bfloat16
    wanted = (before.astype(jnp.float32) + update(ours).delta()).astype(jnp.bfloat16)
    assert (base.kernel[...] == wanted).all()


def test_gradients_of_a_and_b_sum_over_a_single_axis():
    """For a sum over several, XLA's CPU backend first writes the gradient of y transposed."""
    wrapped = layer(LoraConfig(r=R, lora_alpha=ALPHA))
    graphdef, trainable, rest = nnx.split(wrapped, nnx.LoRAParam, ...)
    x = jnp.ones((2, 5, IN))
    gradient = jax.grad(lambda own: nnx.merge(graphdef, own, rest)(x).sum())
    products = [
        equation.params["dimension_numbers"][0]
        for equation in jax.make_jaxpr(gradient)(trainable).eqns
        if equation.primitive.name == "dot_general"
    ]
    assert len(products) >= 4
    assert all(len(left) == 1 for left, _ in products)


def test_a_cpu_computes_the_gradient_of_a_as_a_wide_matrix():
    """A tall and narrow result takes it five times as long."""
    shapes = ((2, 5, 24), (24, 4), (2, 5, 4))
    x, a, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))

    def gradients(x, a, dy):
        return jax.vjp(product, x, a)[1](dy)

    compiled = jax.jit(gradients).lower(x, a, dy).compile()
    assert not re.search(r"f32\[24,4\]\{1,0\} dot\(", compiled.as_text())
    dx, da = compiled(x, a, dy)
    np.testing.assert_allclose(dx, dy @ a.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(da, jnp.einsum("bsi,bso->io", x, dy), rtol=1e-5, atol=1e-6)


def test_a_wrapper_stands_in_for_its_layer():
    """Model code may read the layer's sizes and pass it other arguments, quantized or not."""

    class Scaled(nnx.Linear):
        def __call__(self, x, *, factor=1.0):
            return super().__call__(x) * factor

    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        dense=Scaled(64, OUT, rngs=rngs),
        embed=nnx.Embed(IN, OUT, rngs=rngs),
        conv=nnx.Conv(IN, OUT, (3,), use_bias=False, rngs=rngs),
    )
    x = np.ones((2, 64), np.float32)
    before = model.dense(x, factor=3.0)
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["dense", "embed", "conv"]))
    assert (model.dense(x, factor=3.0) == before).all()
    assert (model.conv.in_features, model.conv.out_features, model.conv.use_bias) == (
        IN,
        OUT,
        False,
    )
    assert (model.embed.num_embeddings, model.embed.features) == (IN, OUT)
    for quantize in (False, True):
        if quantize:
            lora_flax.quantize(model, lora_flax.BitsAndBytesConfig(load_in_8bit=True))
        dense = model.dense
        assert (dense.in_features, dense.out_features, dense.use_bias) == (64, OUT, True)
    with pytest.raises(TypeError, match="factor"):
        model.dense(x, factor=3.0)
