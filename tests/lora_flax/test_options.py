"""Every option of PEFT's LoraConfig, both ways through PEFT's files, against PEFT itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

import lora_flax
from lora_flax import LoraConfig
from tests.lora_flax.encoder import (
    Encoder,
    peft_model,
    shake_torch,
    to_torch,
    tokens,
    torch_output,
    trained,
)
from tests.lora_flax.nets import DEPTH, arrays

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*embedding layer", "ignore:.*config file", "ignore:.*save_embedding_layers"
)

DENSE = ["qkv_proj", "up_proj", "down_proj"]
CASES = {
    "dense": {"target_modules": DENSE},
    "embedding": {"target_modules": ["embed_tokens", "up_proj"]},
    "convolution": {"target_modules": ["conv"]},
    "everything": {"target_modules": [*DENSE, "embed_tokens", "conv", "head"], "use_rslora": True},
    "exclude": {"target_modules": r".*proj", "exclude_modules": ["attn.qkv_proj"]},
    "one of a stack": {"target_modules": ["layers.1.up_proj", "head"]},
    "layers": {"target_modules": DENSE, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "ranks": {
        "target_modules": DENSE,
        "rank_pattern": {"up_proj": 5, r"layers\.1\..*down_proj": 1},
    },
    "alphas": {
        "target_modules": DENSE,
        "alpha_pattern": {"layers.2.attn.qkv_proj": 7, "up_proj": 1},
    },
    "dora": {"target_modules": [*DENSE, "head"], "use_dora": True},
    "dora of some": {"target_modules": ["layers.1.up_proj"], "use_dora": True, "use_rslora": True},
    "dora of an embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "dora of a convolution": {"target_modules": ["conv"], "use_dora": True},
    "bias of B": {"target_modules": ["head", "conv", "layers.0.up_proj"], "lora_bias": True},
    "whole modules": {"target_modules": ["up_proj"], "modules_to_save": ["head", "norm"]},
    "whole embedding": {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["up_proj"], "trainable_token_indices": [2, 7]},
    "tokens by name": {
        "target_modules": ["down_proj"],
        "trainable_token_indices": {"embed_tokens": [10, 0, 3]},
    },
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def fields(request):
    return {"r": 3, "lora_alpha": 5, **CASES[request.param]}


def shake(model: nnx.Module) -> None:
    """Moves all that trains, and leaves the padding of lower ranks alone."""
    trains = lora_flax.mark_only_lora_as_trainable(model)
    rng = np.random.default_rng(1)

    def move(a):
        noise = jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype)
        return a + noise

    nnx.update(model, jax.tree.map(move, nnx.state(model, trains)))


def test_pefts_loads_here(fields, tmp_path):
    """The same logits, the same number of trainable parameters, every tensor used."""
    model = Encoder(nnx.Rngs(0))
    twin = peft_model(model, **fields)
    shake_torch(twin)
    twin.save_pretrained(str(tmp_path))
    report = lora_flax.load_peft(model, tmp_path)
    np.testing.assert_allclose(model(tokens()), torch_output(twin), rtol=1e-4, atol=1e-4)
    assert report.trainable == sum(p.numel() for p in twin.parameters() if p.requires_grad)


def test_ours_loads_in_peft(fields, tmp_path):
    """Trained here, so that what should stay zero is seen to stay zero."""
    model = Encoder(nnx.Rngs(0))
    plain = to_torch(model)
    before = model(tokens())
    report = lora_flax.wrap(model, LoraConfig(**fields))
    np.testing.assert_allclose(model(tokens()), before, rtol=1e-6, atol=1e-6)
    trained(model)
    assert abs(model(tokens()) - before).max() > 1e-2
    lora_flax.save_peft(model, tmp_path, task_type=None)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path), is_trainable=True)
    np.testing.assert_allclose(model(tokens()), torch_output(loaded), rtol=1e-4, atol=1e-4)
    assert report.trainable == sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    # PEFT loads without strictness: the tensors it knows are exactly those in the file.
    ours = load_file(tmp_path / "adapter_model.safetensors")
    theirs = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert theirs.keys() == ours.keys()
    assert all((theirs[key].numpy() == ours[key]).all() for key in ours)


def test_gradients_are_pefts(fields, tmp_path):
    """Of every trainable tensor, by its name in the file."""
    model = Encoder(nnx.Rngs(0))
    twin = peft_model(model, **fields)
    shake_torch(twin)
    twin.save_pretrained(str(tmp_path))
    lora_flax.load_peft(model, tmp_path)
    trains = lora_flax.mark_only_lora_as_trainable(model)
    graphdef, trainable, frozen = nnx.split(model, trains, ...)

    def loss(trainable):
        return (nnx.merge(graphdef, trainable, frozen)(tokens()) ** 2).sum()

    # The gradients go out as an adapter would, and so get PEFT's names.
    nnx.update(model, jax.jit(jax.grad(loss))(trainable))
    lora_flax.save_peft(model, tmp_path / "grads")
    ours = load_file(tmp_path / "grads" / "adapter_model.safetensors")
    (twin(torch.tensor(tokens(), dtype=torch.long)) ** 2).sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    theirs = peft.get_peft_model_state_dict(twin, save_embedding_layers=False)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        scale = max(float(value.abs().max()), 1e-3)
        np.testing.assert_allclose(ours[key], value.numpy(), rtol=1e-4, atol=1e-4 * scale)


def test_merged_is_pefts_and_comes_back_bitwise(fields, tmp_path):
    model = Encoder(nnx.Rngs(0))
    twin = peft_model(model, **fields)
    shake_torch(twin)
    twin.save_pretrained(str(tmp_path))
    lora_flax.load_peft(model, tmp_path)
    if "layers.0.up_proj" in fields["target_modules"] and fields.get("lora_bias"):
        with pytest.raises(lora_flax.LoraError, match="no bias"):
            lora_flax.merge(model)
        return
    before = arrays(model)
    for _ in range(2):
        lora_flax.merge(model)
        np.testing.assert_allclose(model(tokens()), torch_output(twin), rtol=1e-4, atol=1e-4)
        lora_flax.unmerge(model)
        chex.assert_trees_all_equal(arrays(model), before)
    lora_flax.merge_and_unload(model)
    merged = to_torch(model)
    expected = twin.merge_and_unload().state_dict()
    for name, value in merged.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name].numpy(), rtol=1e-4, atol=1e-5)


def test_unwrap_and_round_trip(fields, tmp_path):
    model = Encoder(nnx.Rngs(0))
    before = arrays(model)
    lora_flax.wrap(model, LoraConfig(**fields))
    trained(model)
    out = model(tokens())
    lora_flax.save_peft(model, tmp_path)
    # Into the wrapped model itself, then into a plain one.
    trained(model)
    lora_flax.load_peft(model, tmp_path)
    assert (model(tokens()) == out).all()
    other = Encoder(nnx.Rngs(0))
    lora_flax.load_peft(other, tmp_path)
    np.testing.assert_allclose(other(tokens()), out, rtol=1e-6, atol=1e-6)
    lora_flax.unwrap(model)
    chex.assert_trees_all_equal(arrays(model), before)


def test_padding_of_lower_ranks_stays_zero():
    model = Encoder(nnx.Rngs(0))
    pattern = {"layers.1.up_proj": 1}
    lora_flax.wrap(model, LoraConfig(r=3, target_modules=["up_proj"], rank_pattern=pattern))
    trained(model, steps=3)
    adapter = model.layers.up_proj.adapters["default"]
    assert adapter.lora_A[...].shape[0] == DEPTH
    assert not adapter.lora_A[1, :, 1:].any() and not adapter.lora_B[1, 1:].any()
    assert adapter.lora_B[0].any() and adapter.lora_B[1, 0].any()
