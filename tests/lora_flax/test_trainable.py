import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax.nets import WIDTH, Listed, Stacked, arrays, batch

TARGETS = {Listed: ["proj"], Stacked: "all-linear"}


def wrapped(make, **fields):
    model = make(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=TARGETS[make], **fields))
    return model


def loss(model, x):
    return (model(x) ** 2).mean()


def train_split(model, tx, steps: int = 3) -> list:
    """Steps on the trainable partition; the values after them are put into the model."""
    graphdef, trainable, frozen = nnx.split(
        model, lora_flax.mark_only_lora_as_trainable(model), ...
    )
    opt_state = tx.init(trainable)

    @jax.jit
    def step(trainable, opt_state, frozen, x):
        grads = jax.grad(lambda t: loss(nnx.merge(graphdef, t, frozen), x))(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    for number in range(steps):
        trainable, opt_state = step(trainable, opt_state, frozen, batch(seed=number))
    nnx.update(model, trainable)
    assert step._cache_size() == 1
    return jax.tree.leaves(opt_state)


def train_masked(model, tx, bias: str, steps: int = 3, as_dict: bool = False) -> list:
    """The same with one tree of all parameters and a masked optimizer."""
    graphdef, params = nnx.split(model)
    tree = nnx.to_pure_dict(params) if as_dict else params
    tx = lora_flax.mask_optimizer(tx, lora_flax.trainable_mask(tree, bias))
    opt_state = tx.init(tree)

    def whole(tree):
        if not as_dict:
            return nnx.merge(graphdef, tree)
        state = jax.tree.map(lambda a: a, params)
        nnx.replace_by_pure_dict(state, tree)
        return nnx.merge(graphdef, state)

    @jax.jit
    def step(tree, opt_state, x):
        grads = jax.grad(lambda t: loss(whole(t), x))(tree)
        updates, opt_state = tx.update(grads, opt_state, tree)
        return optax.apply_updates(tree, updates), opt_state

    for number in range(steps):
        tree, opt_state = step(tree, opt_state, batch(seed=number))
    nnx.update(model, nnx.state(whole(tree)))
    return jax.tree.leaves(opt_state)


def expected(model, bias: str) -> set[str]:
    """What PEFT and loralib train, by name."""
    names = arrays(model)
    chosen = {name for name in names if name.endswith(("lora_A", "lora_B"))}
    if bias == "all":
        chosen |= {name for name in names if name.split(".")[-1] == "bias"}
    if bias == "lora_only":
        chosen |= {name for name in names if name.endswith("base.bias")}
    return chosen


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("make", [Listed, Stacked])
def test_only_what_should_train_moves(make, bias):
    """The base is bitwise unchanged, every trainable leaf has moved, no state has other shapes."""
    model = wrapped(make, bias=bias)
    before = arrays(model)
    trains = expected(model, bias)
    leaves = train_split(model, optax.adamw(0.1, weight_decay=0.1))
    after = arrays(model)
    for name in before:
        assert (after[name] != before[name]).any() == (name in trains), name
    slots = sorted(leaf.shape for leaf in leaves if leaf.ndim)
    assert slots == sorted(2 * [before[name].shape for name in trains])


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("make", [Listed, Stacked])
def test_mask_and_split_make_the_same_update(make, bias, as_dict):
    """Clipping included: its norm is that of the trainable gradients only."""
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(0.1, weight_decay=0.1))
    split, masked = wrapped(make, bias=bias), wrapped(make, bias=bias)
    before = arrays(masked)
    train_split(split, tx)
    leaves = train_masked(masked, tx, bias, as_dict=as_dict)
    after = arrays(masked)
    for name, value in arrays(split).items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        if name not in expected(masked, bias):
            assert (after[name] == before[name]).all()
    shapes = {before[name].shape for name in expected(masked, bias)}
    assert {leaf.shape for leaf in leaves if leaf.ndim} <= shapes


def test_the_mask_of_a_full_state_has_parameters_alone():
    """Random state and constants, also inside a module that trains in full, do not train."""

    class Head(nnx.Module):
        def __init__(self, rngs):
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.out = nnx.Linear(WIDTH, 3, rngs=rngs)
            self.shift = nnx.Variable(jnp.ones(3))

        def __call__(self, x):
            return self.out(self.drop(x)) + self.shift[...]

    model = Listed(nnx.Rngs(0))
    model.head = Head(nnx.Rngs(0))
    config = LoraConfig(r=2, target_modules=["proj"], modules_to_save=["head"], use_dora=True)
    lora_flax.wrap(model, config)
    state = nnx.state(model)
    mask = lora_flax.trainable_mask(state)
    assert jax.tree.structure(mask) == jax.tree.structure(state)
    found = {path for path, leaf in nnx.to_flat_state(mask) if leaf.get_value()}
    trains = lora_flax.mark_only_lora_as_trainable(model)
    assert found == {path for path, _ in nnx.to_flat_state(nnx.state(model, trains))}
    assert lora_flax.trainable_mask(nnx.state(model, nnx.Param))


def test_clipping_uses_the_trainable_norm():
    model = wrapped(Stacked)
    params = nnx.state(model)
    mask = lora_flax.trainable_mask(params)
    tx = lora_flax.mask_optimizer(optax.clip_by_global_norm(1.0), mask)
    grads = jax.tree.map(lambda train, a: jnp.full(a.shape, 3.0 if train else 1e6), mask, params)
    clipped, _ = tx.update(grads, tx.init(params), params)
    # The frozen leaves come out as zeros, whatever their gradient was.
    assert optax.tree.norm(clipped) == pytest.approx(1.0, rel=1e-5)


def test_filter_is_the_type_filter_without_biases():
    model = wrapped(Listed)
    by_filter = nnx.state(model, lora_flax.mark_only_lora_as_trainable(model))
    by_type = nnx.state(model, nnx.LoRAParam)
    assert jax.tree.structure(by_filter) == jax.tree.structure(by_type)


def test_nothing_to_train_is_an_error():
    model = Listed(nnx.Rngs(0))
    with pytest.raises(LoraError, match="no LoRA layers"):
        lora_flax.mark_only_lora_as_trainable(model)
    with pytest.raises(LoraError, match="no adapters"):
        lora_flax.trainable_mask(nnx.state(model))


@pytest.mark.parametrize("make", [Listed, Stacked])
def test_tree_mode(make):
    """All of it where NNX treats modules as plain pytrees."""
    with nnx.set_graph_mode(False):
        model = wrapped(make, bias="all", lora_dropout=0.1)
        before = arrays(model)
        train_split(model, optax.adamw(0.1))
        trains = expected(model, "all")
        after = arrays(model)
        assert {name for name in before if (after[name] != before[name]).any()} == trains
        trained = model(batch())
        lora_flax.merge(model)
        np.testing.assert_allclose(model(batch()), trained, rtol=1e-4, atol=1e-4)
        lora_flax.unwrap(model)
        assert not any("lora" in name for name in arrays(model))


def test_no_gradient_of_a_frozen_weight_in_the_program():
    """No matmul of the step gives an array of a frozen kernel's shape."""
    model = wrapped(Stacked)

    def results(*filters) -> set[str]:
        graphdef, trainable, frozen = nnx.split(model, *filters, ...)

        def step(trainable, frozen, x):
            return jax.grad(lambda t: loss(nnx.merge(graphdef, t, frozen), x))(trainable)

        program = jax.jit(step).lower(trainable, frozen, batch(rows=11)).as_text()
        return set(re.findall(r"dot_general.*-> tensor<(\d+x\d+)xf32>", program))

    kernels = {"6x6", "6x10", "10x6", "6x8"}
    assert "11x10" in results(lora_flax.mark_only_lora_as_trainable(model))
    assert not kernels & results(lora_flax.mark_only_lora_as_trainable(model))
    # What the check would see: with the base among what trains, its gradients are there.
    assert kernels & results(nnx.Param)


def test_optimizers_by_group():
    """`param_label` tells A from B from what else trains."""
    model = wrapped(Listed, bias="all")
    trains = lora_flax.mark_only_lora_as_trainable(model)
    params = nnx.state(model, trains)
    labels = jax.tree_util.tree_map_with_path(lambda path, _: lora_flax.param_label(path), params)
    rates = {"lora_A": 0.0, "lora_B": 1.0, "other": 2.0}
    tx = optax.multi_transform({name: optax.sgd(rate) for name, rate in rates.items()}, labels)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    for path, update in nnx.to_flat_state(updates):
        rate = rates.get(path[-1], rates["other"])
        assert (update.get_value() == -rate).all(), path
