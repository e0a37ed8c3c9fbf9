"""`init_lora_weights`: the same start as PEFT's, and the same function as before."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx
from peft.optimizers import create_loraplus_optimizer

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax import nets
from tests.lora_flax.encoder import Encoder, peft_model, shake_torch, to_torch, tokens, torch_output
from tests.lora_flax.nets import Listed, Stacked, arrays, randomize

DENSE = ["qkv_proj", "up_proj", "down_proj", "head"]


def torch_delta(twin, name: str) -> np.ndarray:
    """PEFT's scaled `A B` of one layer, `[in, out]`."""
    layer = twin.base_model.model.get_submodule(name)
    return layer.get_delta_weight("default").detach().numpy().T


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_starts_that_are_taken_out_of_the_base(start, rslora):
    """`A B scale` is PEFT's, which is unique where A and B are not (signs)."""
    fields = {"r": 2, "lora_alpha": 3, "use_rslora": rslora, "target_modules": DENSE}
    model = Encoder(nnx.Rngs(0))
    twin = peft_model(model, init_lora_weights=start, **fields)
    lora_flax.wrap(model, LoraConfig(init_lora_weights=start, **fields))
    for name, path in (
        ("layers.1.attn.qkv_proj", model.layers.attn.qkv_proj),
        ("head", model.head),
    ):
        adapter = path.adapters["default"]
        ours = jnp.matmul(adapter.lora_A[...], adapter.lora_B[...]) * adapter.scale[..., None]
        ours = ours if name == "head" else ours[1]
        np.testing.assert_allclose(ours, torch_delta(twin, name), rtol=1e-3, atol=1e-4)


def test_pissa_niter_finds_the_leading_part():
    """Where singular values fall off, the random subspace is that of the full decomposition."""
    deltas = []
    for start in ("pissa", "pissa_niter_8"):
        model = Encoder(nnx.Rngs(0))
        u, _, vt = np.linalg.svd(np.asarray(model.head.kernel[...]), full_matrices=False)
        kernel = (u * 0.2 ** np.arange(6)) @ vt
        model.head.kernel.set_value(jnp.asarray(kernel))
        lora_flax.wrap(model, LoraConfig(r=2, target_modules=["head"], init_lora_weights=start))
        adapter = model.head.adapters["default"]
        deltas.append(np.asarray(adapter.lora_A[...] @ adapter.lora_B[...]))
    np.testing.assert_allclose(deltas[1], deltas[0], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "start", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]
)
def test_every_start_computes_what_the_base_does(start):
    """Bitwise, for the start is subtracted as it was added; orthogonal to rounding."""
    model = Encoder(nnx.Rngs(0))
    before = model(tokens())
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=DENSE, init_lora_weights=start))
    if start == "orthogonal":
        np.testing.assert_allclose(model(tokens()), before, rtol=1e-5, atol=1e-5)
    else:
        assert (model(tokens()) == before).all()
    kernel = arrays(model)["layers.up_proj.base.kernel"]
    lora_flax.unwrap(model)
    assert (arrays(model)["layers.up_proj.kernel"] == kernel).all()


def test_gaussian_and_orthogonal_are_pefts():
    """The same statistics: normal with deviation 1/r; A B of zero from halves of one basis."""
    wide = 600

    class Model(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(wide, 8, rngs=nnx.Rngs(0))

    model = Model()
    lora_flax.wrap(model, LoraConfig(r=4, target_modules=["head"], init_lora_weights="gaussian"))
    a = model.head.adapters["default"].lora_A[...]
    assert (
        a.std() == pytest.approx(1 / 4, rel=0.05)
        and not model.head.adapters.default.lora_B[...].any()
    )
    model = Model()
    lora_flax.wrap(model, LoraConfig(r=4, target_modules=["head"], init_lora_weights="orthogonal"))
    adapter = model.head.adapters["default"]
    assert abs(adapter.delta()).max() < 1e-5
    # Rows of an orthogonal matrix times standard normals, over 10: deviation sqrt(1/2) / 10.
    assert adapter.lora_A[...].std() == pytest.approx(np.sqrt(0.5) / 10, rel=0.1)
    assert adapter.lora_B[...].any()
    with pytest.raises(LoraError, match="even"):
        LoraConfig(r=3, init_lora_weights="orthogonal")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_trained_start_leaves_for_the_plain_base(start, rslora, tmp_path):
    """The file has twice the rank: what was learned minus where it began, as PEFT converts it."""
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model)
    config = LoraConfig(
        r=2, lora_alpha=3, use_rslora=rslora, target_modules=DENSE, init_lora_weights=start
    )
    lora_flax.wrap(model, config)
    randomize(model)
    out = model(tokens())
    lora_flax.save_peft(model, tmp_path, task_type=None)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    np.testing.assert_allclose(out, torch_output(loaded), rtol=1e-4, atol=1e-4)
    assert loaded.peft_config["default"].r == 4
    other = Encoder(nnx.Rngs(0))
    lora_flax.load_peft(other, tmp_path)
    np.testing.assert_allclose(other(tokens()), out, rtol=1e-4, atol=1e-5)
    lora_flax.merge(model)
    np.testing.assert_allclose(model(tokens()), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_pefts_unconverted_adapter_loads_here(start, tmp_path):
    """PEFT takes the start out of the base again when it loads one; so do we."""
    model = Encoder(nnx.Rngs(0))
    twin = peft_model(model, r=2, lora_alpha=3, target_modules=DENSE, init_lora_weights=start)
    shake_torch(twin)
    twin.save_pretrained(str(tmp_path))
    lora_flax.load_peft(model, tmp_path)
    np.testing.assert_allclose(model(tokens()), torch_output(twin), rtol=1e-4, atol=1e-4)


def test_pissa_with_dora_and_slices():
    model = Encoder(nnx.Rngs(0))
    before = model(tokens())
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    lora_flax.wrap(model, config)
    assert (model(tokens()) == before).all()
    lora_flax.unwrap(model)
    config = LoraConfig(r=2, target_modules=DENSE, init_lora_weights="pissa", use_dora=True)
    lora_flax.wrap(model, config)
    np.testing.assert_allclose(model(tokens()), before, rtol=1e-5, atol=1e-5)


def test_false_starts_at_random():
    """For tests only, as in PEFT: the output changes."""
    model = Encoder(nnx.Rngs(0))
    before = model(tokens())
    targets = [*DENSE, "conv", "embed_tokens"]
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert abs(model(tokens()) - before).max() > 1e-2


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", "eva"])
def test_starts_for_dense_layers_only(start):
    model = Encoder(nnx.Rngs(0))
    before = arrays(model)
    config = LoraConfig(r=2, target_modules=["up_proj", "conv"], init_lora_weights=start)
    with pytest.raises(LoraError, match="only dense layers, not conv"):
        lora_flax.wrap(model, config)
    assert arrays(model).keys() == before.keys()


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (Listed, {"modules_to_save": ["norm", "head"], "bias": "lora_only", "use_dora": True}),
        (Listed, {"lora_bias": True}),
        (Stacked, {"use_dora": True}),
        (Stacked, {"lora_bias": True}),
    ],
)
def test_loraplus_groups_are_pefts(make, fields):
    """Every parameter's rate, vectors included, each layer of a stack like a layer of its own."""
    model = make(nnx.Rngs(0))
    fields = {"r": 2, "target_modules": ["proj" if make is Listed else "up_proj"], **fields}
    twin = peft.get_peft_model(nets.to_torch(model), peft.LoraConfig(**fields))
    optimizer = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16.0)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.fill_(group["lr"])
    lora_flax.wrap(model, LoraConfig(**fields))
    params = nnx.state(model, lora_flax.mark_only_lora_as_trainable(model))
    tx = lora_flax.loraplus(optax.sgd(-1.0), 16.0)
    rates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    nnx.update(model, rates)  # so that they are written under PEFT's names
    ours = lora_flax.to_peft(model, task_type=None).tensors
    theirs = peft.get_peft_model_state_dict(twin)
    chex.assert_trees_all_equal(ours, {key: value.numpy() for key, value in theirs.items()})


@pytest.mark.parametrize("rate", [1.0, 16.0])
def test_loraplus_is_pefts(rate):
    """Two steps of AdamW with weight decay, B at its own rate, against PEFT's optimizer groups."""
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["up_proj", "head"]}
    model = Encoder(nnx.Rngs(0))
    twin = peft_model(model, **fields)
    shake_torch(twin)
    lora_flax.wrap(model, LoraConfig(**fields))
    for name, index in (("layers.{}.up_proj", 3), ("head", 0)):
        module = model.layers.up_proj if index else model.head
        for part in ("lora_A", "lora_B"):
            value = [
                getattr(twin.base_model.model.get_submodule(name.format(i)), part)["default"]
                .weight.detach().numpy().T
                for i in range(index or 1)
            ]  # fmt: skip
            variable = getattr(module.adapters["default"], part)
            variable.set_value(jnp.asarray(np.stack(value)).reshape(variable[...].shape))
    optimizer = create_loraplus_optimizer(
        twin, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=rate, loraplus_weight_decay=0.1
    )
    trains = lora_flax.mark_only_lora_as_trainable(model)
    graphdef, update, rest = nnx.split(model, trains, ...)
    tx = lora_flax.loraplus(optax.adamw(1e-2, weight_decay=0.1), rate)
    state = tx.init(update)

    @jax.jit
    def step(update, state):
        grads = jax.grad(lambda u: (nnx.merge(graphdef, u, rest)(tokens()) ** 2).mean())(update)
        updates, state = tx.update(grads, state, update)
        return optax.apply_updates(update, updates), state

    for _ in range(2):
        optimizer.zero_grad()
        (twin(torch.tensor(tokens(), dtype=torch.long)) ** 2).mean().backward()
        optimizer.step()
        update, state = step(update, state)
    nnx.update(model, update)
    np.testing.assert_allclose(model(tokens()), torch_output(twin), rtol=1e-3, atol=1e-4)
