"""LoRA on slices of a fused projection: against loralib's MergedLinear, out to PEFT and back."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import loralib
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_flax
from lora_flax import LoraConfig, LoraError
from lora_flax.index import ModelIndex
from lora_flax.peft import pairs
from tests.lora_flax.encoder import (
    SLICES,
    Encoder,
    peft_model,
    shake_torch,
    to_torch,
    tokens,
    torch_output,
)
from tests.lora_flax.nets import DEPTH, WIDTH, Dense, Stacked, arrays, randomize


class Fused(nnx.Module):
    def __init__(self, features_in: int, slices: tuple[tuple[str, int], ...]):
        self.proj = Dense((features_in, sum(size for _, size in slices)), rngs=nnx.Rngs(0))
        self.proj.slices = slices

    def __call__(self, x):
        return self.proj(x)


@pytest.mark.parametrize("enabled", [(True, False, True), (False, True, False), (True, True, True)])
def test_merged_linear_of_loralib(enabled):
    """Forward, gradients and merged weight; loralib's B is a grouped convolution's."""
    names, size, width, r = ("q", "k", "v"), 4, 5, 2
    model = Fused(width, tuple((name, size) for name in names))
    chosen = [name for name, on in zip(names, enabled, strict=True) if on]
    lora_flax.wrap(model, LoraConfig(r=r, lora_alpha=3, target_modules=chosen))
    randomize(model)
    adapter = model.proj.adapters["default"]
    twin = loralib.MergedLinear(
        width, 3 * size, r=r, lora_alpha=3, enable_lora=list(enabled), bias=False
    )
    with torch.no_grad():
        twin.weight.copy_(torch.tensor(np.array(model.proj.base.kernel[...].T)))
        twin.lora_A.copy_(torch.tensor(np.array(adapter.lora_A[...].T)))
        twin.lora_B.copy_(torch.tensor(np.array(adapter.lora_B[...].T)))
    twin.train()
    x = np.random.default_rng(0).normal(size=(6, width)).astype(np.float32)
    theirs = twin(torch.tensor(x))
    np.testing.assert_allclose(model(x), theirs.detach().numpy(), rtol=1e-5, atol=1e-5)

    (theirs**2).sum().backward()
    graphdef, update, rest = nnx.split(model, nnx.LoRAParam, ...)
    loss = lambda u: (nnx.merge(graphdef, u, rest)(x) ** 2).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(update)
    grads = grads["proj"]["adapters"]["default"]
    np.testing.assert_allclose(grads["lora_A"][...], twin.lora_A.grad.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["lora_B"][...], twin.lora_B.grad.T, rtol=1e-4, atol=1e-4)

    lora_flax.merge(model)
    twin.eval()
    merged = twin.weight.detach().numpy().T
    np.testing.assert_allclose(model.proj.base.kernel[...], merged, rtol=1e-5, atol=1e-5)


def test_start_is_that_of_merged_linear():
    """A uniform for all slices alike, B zero."""
    model = Fused(400, (("q", 64), ("k", 64), ("v", 64)))
    lora_flax.wrap(model, LoraConfig(r=16, target_modules=["q", "v"]))
    adapter = model.proj.adapters["default"]
    twin = loralib.MergedLinear(400, 192, r=16, enable_lora=[True, False, True])
    assert adapter.lora_A[...].shape == tuple(twin.lora_A.shape[::-1])
    assert adapter.lora_A[...].std() == pytest.approx(float(twin.lora_A.detach().std()), rel=0.03)
    assert not adapter.lora_B[...].any() and not twin.lora_B.any()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), width=st.integers(2, 6), rslora=st.booleans())
def test_any_slices_of_any_size_leave_as_one_pair(data, width, rslora):
    """The fused pair of the file computes what the slices do, ranks and alphas of their own too."""
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    slices = tuple((f"s{i}", size) for i, size in enumerate(sizes))
    chosen = data.draw(st.lists(st.sampled_from(slices), min_size=1, unique=True))
    ranks = {name: data.draw(st.integers(1, min(width, size))) for name, size in chosen}
    alphas = {name: data.draw(st.floats(0.5, 32)) for name, _ in chosen}
    model = Fused(width, slices)
    config = LoraConfig(
        target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora
    )
    lora_flax.wrap(model, config)
    trains = lora_flax.mark_only_lora_as_trainable(model)
    graphdef, update, rest = nnx.split(model, trains, ...)
    x = np.random.default_rng(0).normal(size=(6, width)).astype(np.float32)

    @jax.jit
    def step(update):
        grads = jax.grad(lambda u: (nnx.merge(graphdef, u, rest)(x) ** 3).sum())(update)
        return jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), update, grads)

    nnx.update(model, step(step(update)))

    (layer,) = ModelIndex(model).layers
    (pair,) = pairs.pairs(layer, model.proj.adapters["default"], unfused=False)
    assert pair.rank == sum(ranks.values())
    scale = pair.alpha / (np.sqrt(pair.rank) if rslora else pair.rank)
    kernel = np.asarray(model.proj.base.kernel[...]) + pair.a @ pair.b * scale
    np.testing.assert_allclose(model(x), x @ kernel, rtol=1e-4, atol=1e-4)
    parts = pairs.pairs(layer, model.proj.adapters["default"], unfused=True)
    assert {p.name: p.rank for p in parts} == ranks


def test_dora_on_slices_reads_one_weight_of_a_stack_at_a_time(monkeypatch):
    """The magnitudes of columns without an update are the norms of the member's own weight."""
    model = Stacked(nnx.Rngs(0))
    model.layers.attn.qkv_proj.slices = (("q_proj", 2), ("k_proj", 2), ("v_proj", 2))
    config = LoraConfig(r=1, target_modules=["q_proj", "v_proj"], use_dora=True)
    lora_flax.wrap(model, config)
    on_host, copied = pairs.on_host, []
    monkeypatch.setattr(pairs, "on_host", lambda a: copied.append(a.shape) or on_host(a))
    layer = next(layer for layer in ModelIndex(model).layers if layer.slices)
    found = pairs.pairs(layer, layer.adapter("default"), unfused=False)
    weights = np.asarray(model.layers.attn.qkv_proj.base.kernel[...])
    for pair, weight in zip(found, weights, strict=True):
        np.testing.assert_allclose(pair.magnitude, np.linalg.norm(weight, axis=0), rtol=1e-6)
    assert copied.count((WIDTH, WIDTH)) == DEPTH
    assert weights.shape not in copied


def test_dora_on_other_slices_of_each_layer(tmp_path):
    """Weight decay also reaches the magnitudes of slices that a layer does not train."""
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model)
    targets = ["layers.0.attn.q_proj", "layers.1.attn.v_proj"]
    lora_flax.wrap(model, LoraConfig(r=1, target_modules=targets, use_dora=True))
    randomize_by_steps(model)
    (layer,) = (layer for layer in ModelIndex(model).layers if layer.adapter("default"))
    magnitude = layer.adapter("default").lora_magnitude
    magnitude.set_value(0.9 * magnitude[...])
    lora_flax.save_peft(model, tmp_path, task_type=None)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    np.testing.assert_allclose(model(tokens()), torch_output(loaded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"]
)
def test_a_fused_file_loads_onto_a_model_wrapped_in_slices(fields, tmp_path):
    config = LoraConfig(r=1, lora_alpha=3, target_modules=["q_proj", "v_proj"], **fields)
    model, other = Encoder(nnx.Rngs(0)), Encoder(nnx.Rngs(0))
    for each in (model, other):
        lora_flax.wrap(each, config)
    randomize(model)
    lora_flax.save_peft(model, tmp_path, task_type=None)
    lora_flax.load_peft(other, tmp_path)
    np.testing.assert_allclose(other(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)

    other = Encoder(nnx.Rngs(0))
    lora_flax.wrap(other, dataclasses.replace(config, target_modules=["q_proj", "k_proj"]))
    with pytest.raises(LoraError, match="different slices"):
        lora_flax.load_peft(other, tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "up_proj"], ["attn.k_proj"]])
def test_slices_leave_as_pefts_fused_form(targets, rslora, tmp_path):
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model)
    fields = {"r": 1, "lora_alpha": 3, "use_rslora": rslora}
    lora_flax.wrap(model, LoraConfig(target_modules=targets, **fields))
    randomize(model)
    out = model(tokens())
    lora_flax.save_peft(model, tmp_path, task_type=None)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    np.testing.assert_allclose(out, torch_output(loaded), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "qkv_proj" in config["target_modules"]
    rank = 2 if len(targets) > 1 else 1
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (rank, 3 * rank, {})

    # Back over the slices bitwise, over a plain model as one pair.
    trained = arrays(model)
    randomize(model, seed=2)
    lora_flax.load_peft(model, tmp_path)
    chex.assert_trees_all_equal(arrays(model), trained)
    other = Encoder(nnx.Rngs(0))
    lora_flax.load_peft(other, tmp_path)
    np.testing.assert_allclose(other(tokens()), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
        {"target_modules": r".*layers\.1\..*(v_proj|k_proj|up_proj)"},
        {"target_modules": r".*attn\.\w+", "exclude_modules": r".*v_proj"},
    ],
    ids=str,
)
def test_projections_by_their_own_names_both_ways(fields, tmp_path):
    """A Llama-style adapter loads here; slices leave as one."""
    model = Encoder(nnx.Rngs(0))
    fields = {"r": 1, "lora_alpha": 3, **fields}
    twin = peft_model(model, unfused=True, **fields)
    shake_torch(twin)
    twin.save_pretrained(str(tmp_path / "theirs"))
    plain = to_torch(model, unfused=True)
    report = lora_flax.load_peft(model, tmp_path / "theirs")
    np.testing.assert_allclose(model(tokens()), torch_output(twin), rtol=1e-4, atol=1e-4)
    assert report.trainable == sum(p.numel() for p in twin.parameters() if p.requires_grad)

    randomize_by_steps(model)
    lora_flax.save_peft(model, tmp_path / "ours", task_type=None, unfused=True)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "ours"))
    np.testing.assert_allclose(model(tokens()), torch_output(loaded), rtol=1e-4, atol=1e-4)


def randomize_by_steps(model) -> None:
    trains = lora_flax.mark_only_lora_as_trainable(model)
    graphdef, update, rest = nnx.split(model, trains, ...)

    @jax.jit
    def step(update):
        grads = jax.grad(lambda u: (nnx.merge(graphdef, u, rest)(tokens()) ** 2).sum())(update)
        return jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), update, grads)

    nnx.update(model, step(update))


def test_a_whole_update_leaves_by_the_projections_names(tmp_path):
    """Its A is shared by the projections."""
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model, unfused=True)
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["qkv_proj"]))
    randomize(model)
    lora_flax.save_peft(model, tmp_path, task_type=None, unfused=True)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    np.testing.assert_allclose(model(tokens()), torch_output(loaded), rtol=1e-4, atol=1e-4)


def test_a_full_update_is_not_taken_for_slices(tmp_path):
    model = Encoder(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["qkv_proj"]))
    randomize(model)
    lora_flax.save_peft(model, tmp_path)
    sliced = Encoder(nnx.Rngs(0))
    lora_flax.wrap(sliced, LoraConfig(r=1, target_modules=["q_proj", "v_proj"]))
    before = arrays(sliced)
    with pytest.raises(LoraError, match="different slices"):
        lora_flax.load_peft(sliced, tmp_path)
    chex.assert_trees_all_equal(arrays(sliced), before)


def test_a_layer_and_its_slice_exclude_each_other():
    with pytest.raises(LoraError, match=r"as a whole and by slices.*q_proj, k_proj, v_proj"):
        lora_flax.wrap(Encoder(nnx.Rngs(0)), LoraConfig(r=1, target_modules=["qkv_proj", "q_proj"]))
    with pytest.raises(LoraError, match=r"r=2 exceeds the smaller side of layers.attn.k_proj"):
        lora_flax.wrap(Encoder(nnx.Rngs(0)), LoraConfig(r=2, target_modules=["k_proj"]))


def test_only_the_chosen_columns_change():
    model = Encoder(nnx.Rngs(0))
    kernel = np.array(model.layers.attn.qkv_proj.kernel[...])
    config = LoraConfig(r=1, target_modules=["q_proj", "v_proj"])
    report = lora_flax.wrap(model, dataclasses.replace(config, bias="none"))
    assert report.layers[0].name == "layers.attn.qkv_proj (q_proj, v_proj)"
    randomize(model)
    lora_flax.merge_and_unload(model)
    changed = (model.layers.attn.qkv_proj.kernel[...] != kernel).any(axis=(0, 1))
    starts = np.cumsum([0, *(size for _, size in SLICES)])
    assert changed[starts[0] : starts[1]].all() and changed[starts[2] : starts[3]].all()
    assert not changed[starts[1] : starts[2]].any()
    assert DEPTH == kernel.shape[0]
