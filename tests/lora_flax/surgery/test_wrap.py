import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_flax
from lora_flax import LoraConfig, LoRADense, LoraError
from tests.lora_flax.nets import (
    DEPTH,
    HIDDEN,
    WIDTH,
    Listed,
    Stacked,
    Unrolled,
    arrays,
    batch,
    randomize,
)

ALL = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")


@pytest.fixture(params=[Listed, Stacked])
def model(request):
    return request.param(nnx.Rngs(0))


def test_wrapping_is_the_identity(model):
    x = batch()
    before = model(x)
    lora_flax.wrap(model, ALL)
    assert any(isinstance(module, LoRADense) for _, module in nnx.iter_modules(model))
    assert (model(x) == before).all()


def test_wrapping_is_the_identity_in_bfloat16_under_jit():
    model, x = Stacked(nnx.Rngs(0), dtype=jnp.bfloat16), jnp.asarray(batch(), jnp.bfloat16)

    def run():
        graphdef, state = nnx.split(model)
        return jax.jit(lambda state: nnx.merge(graphdef, state)(x))(state)

    before = run()
    lora_flax.wrap(model, ALL)
    assert (run() == before).all()


@pytest.mark.parametrize("merged", [False, True])
def test_unwrap_gives_the_base_back(model, merged):
    modules, before = dict(nnx.iter_modules(model)), arrays(model)
    lora_flax.wrap(model, ALL)
    randomize(model)
    if merged:
        lora_flax.merge(model)
    lora_flax.unwrap(model)
    after = dict(nnx.iter_modules(model))
    assert after.keys() == modules.keys()
    assert all(after[path] is modules[path] for path in modules)
    chex.assert_trees_all_equal(arrays(model), before)


def test_a_stack_is_its_layers_one_by_one():
    """The same A and B in a scanned stack and in a list of layers give the same output."""
    stacked, single = Stacked(nnx.Rngs(0)), Unrolled(nnx.Rngs(0))
    for model in (stacked, single):
        lora_flax.wrap(model, ALL)
    randomize(stacked)
    values = nnx.state(stacked)
    for index, layer in enumerate(single.layers):
        nnx.update(layer, jax.tree.map(lambda a, i=index: a[i], values["layers"]))
    nnx.update(single.lm_head, values["lm_head"])
    np.testing.assert_allclose(stacked(batch()), single(batch()), rtol=1e-5, atol=1e-6)


def test_states_that_do_not_allow_a_call(model):
    for call in (lora_flax.unwrap, lora_flax.merge, lora_flax.unmerge, lora_flax.report):
        with pytest.raises(LoraError, match="no LoRA layers"):
            call(model)
    lora_flax.wrap(model, ALL)
    with pytest.raises(LoraError, match="unwrap it first"):
        lora_flax.wrap(model, ALL)
    with pytest.raises(LoraError, match="not merged"):
        lora_flax.unmerge(model)
    lora_flax.merge(model)
    merged = arrays(model)
    with pytest.raises(LoraError, match="already merged"):
        lora_flax.merge(model)
    chex.assert_trees_all_equal(arrays(model), merged)
    with pytest.raises(LoraError, match="call unmerge first"):
        lora_flax.mark_only_lora_as_trainable(model)


def test_a_rank_above_the_kernel_names_every_layer():
    model = Stacked(nnx.Rngs(0))
    before = dict(nnx.iter_modules(model))
    with pytest.raises(LoraError) as error:
        lora_flax.wrap(model, LoraConfig(r=WIDTH + 1, target_modules=["qkv_proj", "up_proj"]))
    assert f"layers.attn.qkv_proj [{WIDTH}, {WIDTH}]" in str(error.value)
    assert f"layers.up_proj [{WIDTH}, {HIDDEN}]" in str(error.value)
    assert dict(nnx.iter_modules(model)) == before


def test_the_start_goes_by_rngs():
    def first(rngs):
        model = Stacked(nnx.Rngs(0))
        lora_flax.wrap(model, ALL, rngs)
        return arrays(model, nnx.LoRAParam)["layers.up_proj.adapters.default.lora_A"]

    assert (first(None) == first(nnx.Rngs(0))).all()
    assert (first(nnx.Rngs(1)) != first(nnx.Rngs(0))).any()


def test_report_and_table():
    model = Stacked(nnx.Rngs(0))
    report = lora_flax.wrap(model, ALL)
    assert report == lora_flax.report(model)
    per_layer = 2 * (2 * WIDTH + 2 * (WIDTH + HIDDEN))
    assert report.trainable == DEPTH * per_layer
    base = DEPTH * (WIDTH * WIDTH + 2 * WIDTH * HIDDEN) + WIDTH * 8
    assert report.total == base + report.trainable
    table = lora_flax.format_table(report)
    assert "layers.attn.qkv_proj" in table and f"{report.trainable:,} of" in table
    assert "lm_head" not in table


def test_abstract_models_wrap():
    """Shapes are enough: a model too large for this machine can be planned."""

    def build():
        model = Stacked(nnx.Rngs(0))
        lora_flax.wrap(model, ALL)
        return model

    shapes = nnx.state(nnx.eval_shape(build), nnx.LoRAParam)
    assert shapes["layers"]["up_proj"]["adapters"]["default"]["lora_A"].get_value().shape == (
        DEPTH,
        WIDTH,
        2,
    )
