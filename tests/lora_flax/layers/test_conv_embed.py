"""Convolutions and embeddings of every kind, against PEFT and loralib."""

import jax
import jax.numpy as jnp
import loralib
import numpy as np
import peft
import pytest
import torch
from flax import nnx

import lora_flax
from lora_flax import LoraConfig, LoraError

KINDS = {
    1: (torch.nn.Conv1d, (9,)),
    2: (torch.nn.Conv2d, (8, 7)),
    3: (torch.nn.Conv3d, (5, 6, 4)),
}


class Holder(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


def conv(dims: int, kernel=3, **options) -> Holder:
    window = (kernel,) * dims
    return Holder(nnx.Conv(4, 6, window, rngs=nnx.Rngs(0), **options))


def torch_twin(model: Holder, dims: int, **options):
    """PEFT on the same convolution; `options` are torch's."""
    base = model.layer
    module = KINDS[dims][0](4, 6, base.kernel_size, **options)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(to_torch(base.kernel[...])))
        module.bias.copy_(torch.tensor(np.array(base.bias[...])))
    return torch.nn.ModuleDict({"layer": module})


def to_torch(kernel) -> np.ndarray:
    return np.moveaxis(np.array(kernel), (-1, -2), (0, 1))


def images(dims: int) -> np.ndarray:
    shape = (2, *KINDS[dims][1], 4)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


CASES = [
    ({}, {"padding": "VALID"}, {}),
    ({}, {"padding": 1}, {"padding": 1}),
    ({}, {"padding": 1, "strides": 2}, {"padding": 1, "stride": 2}),
    ({"use_rslora": True}, {"padding": 1, "feature_group_count": 2}, {"padding": 1, "groups": 2}),
    ({"use_dora": True}, {"padding": 1, "strides": 2}, {"padding": 1, "stride": 2}),
    ({"lora_bias": True}, {"padding": "VALID"}, {}),
]


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd", "ignore:.*invalid shape")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("fields", "options", "torch_options"), CASES, ids=str)
def test_convolution(dims, fields, options, torch_options, tmp_path):
    """Output and merged weight are PEFT's, and the file is."""
    model = conv(dims, **options)
    twin = torch_twin(model, dims, **torch_options)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], **fields}
    adapted = peft.get_peft_model(twin, peft.LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(str(tmp_path))
    lora_flax.load_peft(model, tmp_path)
    x = images(dims)
    layer = adapted.base_model.model["layer"]
    with torch.no_grad():
        theirs = layer(torch.tensor(np.moveaxis(x, -1, 1))).numpy()
    np.testing.assert_allclose(model(x), np.moveaxis(theirs, 1, -1), rtol=1e-4, atol=1e-4)
    if options.get("feature_group_count"):
        with pytest.raises(LoraError, match="groups cannot be merged"):
            lora_flax.merge(model)
        return
    out = model(x)
    lora_flax.merge(model)
    np.testing.assert_allclose(model(x), out, rtol=1e-4, atol=1e-4)
    layer.merge()
    merged = layer.base_layer.weight.detach().numpy()
    np.testing.assert_allclose(to_torch(model.layer.kernel[...]), merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", "REFLECT", "CAUSAL", ((2, 1),)])
def test_dilation_and_paddings_that_peft_has_not(padding):
    """PEFT's A has no dilation and fails; here it is the base's, so the merged kernel agrees."""
    layer = nnx.Conv(4, 6, (3,), padding=padding, kernel_dilation=2, rngs=nnx.Rngs(0))
    model = Holder(layer)
    lora_flax.wrap(model, LoraConfig(r=3, target_modules=["layer"]))
    b = model.layer.adapters["default"].lora_B
    b.set_value(jnp.asarray(np.random.default_rng(0).normal(size=b[...].shape), jnp.float32))
    x = images(1)
    out = model(x)
    lora_flax.merge(model)
    np.testing.assert_allclose(model(x), out, rtol=1e-4, atol=1e-4)


def test_convolutions_that_cannot_be_adapted():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        up=nnx.ConvTranspose(4, 3, (3, 3), rngs=rngs),
        masked=nnx.Conv(4, 6, (3,), mask=jnp.ones((3, 4, 6)), rngs=rngs),
        first=nnx.LinearGeneral(4, 4, axis=-2, rngs=rngs),
        head=nnx.Linear(4, 4, rngs=rngs),
    )
    for names, said in (
        (["up"], r"\['up'\] matched no layer.*skipped.*up \[3, 3, 4, 3\]"),
        (["masked", "head"], "masked has a mask"),
        (["first"], r"matched no layer.*first \[4, 4\]"),
    ):
        with pytest.raises(LoraError, match=said):
            lora_flax.wrap(model, LoraConfig(r=2, target_modules=names))
        assert isinstance(model.head, nnx.Linear)
    lora_flax.wrap(model, LoraConfig(r=2, target_modules="all-linear"))
    assert isinstance(model.up, nnx.ConvTranspose) and isinstance(model.first, nnx.LinearGeneral)


def test_start_of_a_convolution_is_pefts():
    model = Holder(nnx.Conv(64, 32, (3, 3), rngs=nnx.Rngs(0)))
    lora_flax.wrap(model, LoraConfig(r=16, target_modules=["layer"]))
    adapter = model.layer.adapters["default"]
    twin = torch.nn.ModuleDict({"layer": torch.nn.Conv2d(64, 32, 3)})
    twin = peft.get_peft_model(twin, peft.LoraConfig(r=16, target_modules=["layer"]))
    a = twin.base_model.model["layer"].lora_A["default"].weight.detach().numpy()
    assert to_torch(adapter.lora_A[...]).shape == a.shape
    assert adapter.lora_A[...].std() == pytest.approx(a.std(), rel=0.05)
    assert not adapter.lora_B[...].any()


def test_embedding_is_loralibs():
    """Forward, gradients, merged weight and start."""
    model = Holder(nnx.Embed(9, 5, rngs=nnx.Rngs(0)))
    lora_flax.wrap(model, LoraConfig(r=2, lora_alpha=3, target_modules=["layer"]))
    adapter = model.layer.adapters["default"]
    twin = loralib.Embedding(9, 5, r=2, lora_alpha=3)
    assert not adapter.lora_A[...].any() and not twin.lora_A.any()
    rng = np.random.default_rng(0)
    for part in (adapter.lora_A, adapter.lora_B):
        part.set_value(jnp.asarray(rng.normal(size=part[...].shape), jnp.float32))
    with torch.no_grad():
        twin.weight.copy_(torch.tensor(np.array(model.layer.base.embedding[...])))
        twin.lora_A.copy_(torch.tensor(np.array(adapter.lora_A[...].T)))
        twin.lora_B.copy_(torch.tensor(np.array(adapter.lora_B[...].T)))
    twin.train()
    ids = rng.integers(0, 9, (3, 4))
    theirs = twin(torch.tensor(ids))
    np.testing.assert_allclose(model(ids), theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
    (theirs**2).sum().backward()
    graphdef, update, rest = nnx.split(model, nnx.LoRAParam, ...)
    grads = jax.grad(lambda u: (nnx.merge(graphdef, u, rest)(ids) ** 2).sum())(update)
    grads = grads["layer"]["adapters"]["default"]
    np.testing.assert_allclose(grads["lora_A"][...], twin.lora_A.grad.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["lora_B"][...], twin.lora_B.grad.T, rtol=1e-4, atol=1e-4)
    lora_flax.merge(model)
    twin.eval()
    merged = twin.weight.detach().numpy()
    np.testing.assert_allclose(model.layer.base.embedding[...], merged, rtol=1e-5, atol=1e-5)


def test_start_of_an_embedding_is_normal():
    model = Holder(nnx.Embed(400, 300, rngs=nnx.Rngs(0)))
    lora_flax.wrap(model, LoraConfig(r=16, target_modules=["layer"]))
    adapter = model.layer.adapters["default"]
    reference = loralib.Embedding(400, 300, r=16).lora_B
    assert adapter.lora_B[...].std() == pytest.approx(float(reference.detach().std()), rel=0.05)


def test_a_tied_head_reads_the_base_alone_or_the_trained_rows():
    x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    model = Holder(nnx.Embed(9, 5, rngs=nnx.Rngs(0)))
    before = model.layer.attend(x)
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    assert (model.layer.attend(x) == before).all()
    lora_flax.unwrap(model)
    lora_flax.wrap(model, LoraConfig(trainable_token_indices={"layer": [3, 1]}))
    rows = model.layer.adapters["default"].rows
    rows.set_value(rows[...] + 1)
    table = np.array(model.layer.base.embedding[...])
    table[[3, 1]] += 1
    np.testing.assert_allclose(model.layer.attend(x), x @ table.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.layer(np.arange(9)), table, rtol=1e-6)
    lora_flax.merge_and_unload(model)
    np.testing.assert_allclose(model.layer.embedding[...], table, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["layer"], "r": 3}, "divisible by its 2 groups"),
        ({"target_modules": ["layer"], "r": 4, "use_dora": True}, "groups"),
        (
            {"target_modules": ["layer"], "r": 2, "modules_to_save": ["nothing"]},
            "matched no module",
        ),
        ({"trainable_token_indices": [1]}, "no embedding 'embed_tokens'"),
    ],
    ids=str,
)
def test_bad_input_changes_nothing(config, said):
    model = conv(2, feature_group_count=2)
    before = model.layer
    with pytest.raises(LoraError, match=said):
        lora_flax.wrap(model, LoraConfig(**config))
    assert model.layer is before


def test_a_token_that_is_not_there():
    model = Holder(nnx.Embed(9, 5, rngs=nnx.Rngs(0)))
    with pytest.raises(LoraError, match=r"\[9\]: the embedding has 9 rows"):
        lora_flax.wrap(model, LoraConfig(trainable_token_indices={"layer": [9, 2]}))
    assert isinstance(model.layer, nnx.Embed)
