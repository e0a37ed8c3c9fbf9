"""EVA against PEFT's own, on the encoder and its twin."""

import numpy as np
import peft
import pytest
import torch
from flax import nnx

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax.encoder import VOCAB, Encoder, to_torch, tokens
from tests.lora_flax.nets import DEPTH

TARGETS = ["qkv_proj", "up_proj", "down_proj", "head"]


def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    # Tokens of unequal frequency, so that the components stand apart.
    weights = 0.6 ** np.arange(VOCAB)
    return [
        rng.choice(VOCAB, size=(8, 9), p=weights / weights.sum()).astype(np.int32) for _ in range(3)
    ]


def theirs(model: Encoder, rho: float, whiten: bool):
    """PEFT's A by module, run until it has seen all the data as one batch."""
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, whiten=whiten, tau=0.9999),
    )  # fmt: skip
    twin = peft.get_peft_model(to_torch(model), config)
    data = [torch.tensor(np.concatenate(batches()), dtype=torch.long)]
    peft.initialize_lora_eva_weights(
        twin,
        data,
        forward_fn=lambda net, inputs: net(inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: (x[0] if isinstance(x, tuple) else x).reshape(
            -1, x[0].shape[-1] if isinstance(x, tuple) else x.shape[-1]
        ),
        show_progress_bar=False,
    )
    return twin


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("rho", "whiten"), [(1.0, False), (1.0, True), (2.0, False)])
def test_components_and_ranks_are_pefts(rho, whiten):
    model = Encoder(nnx.Rngs(0))
    twin = theirs(model, rho, whiten)
    plain = model(tokens())
    lora_flax.wrap(
        model,
        LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights="eva"),
    )
    lora_flax.initialize_lora_eva_weights(
        model, batches(), lambda net, ids: net(ids), rho=rho, whiten=whiten
    )
    assert (model(tokens()) == plain).all()
    checked = 0
    layers = {"attn.qkv_proj": model.layers.attn.qkv_proj, "up_proj": model.layers.up_proj,
              "down_proj": model.layers.down_proj}  # fmt: skip
    named = [(f"layers.{i}.{n}", m, i) for n, m in layers.items() for i in range(DEPTH)]
    for name, module, index in [*named, ("head", model.head, None)]:
        adapter = module.adapters["default"]
        member = 0 if index is None else index
        rank = adapter.spec.ranks[member][0]
        layer = twin.base_model.model.get_submodule(name)
        if not hasattr(layer, "lora_A"):
            assert rank == 0
            continue
        a = layer.lora_A["default"].weight.detach().numpy()
        assert rank == len(a), name
        ours = adapter.lora_A[...] if index is None else adapter.lora_A[index]
        ours = np.asarray(ours)[:, :rank].T
        if whiten:  # PEFT's singular values grow with the batches that it went through again
            a = a * np.linalg.norm(ours[0]) / np.linalg.norm(a[0])
        signs = np.sign((ours * a).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(ours * signs, a, rtol=2e-2, atol=2e-2, err_msg=name)
        assert adapter.scale[...].reshape(-1)[member] == pytest.approx(layer.scaling["default"])
        checked += 1
    assert checked >= 8


def test_the_mask_leaves_positions_out():
    """As if the masked tokens had not been there."""

    def components(data, mask):
        model = Encoder(nnx.Rngs(0))
        config = LoraConfig(r=2, target_modules=["head"], init_lora_weights="eva")
        lora_flax.wrap(model, config)
        lora_flax.initialize_lora_eva_weights(model, data, lambda n, b: n(b), mask, rho=1.0)
        a = np.asarray(model.head.adapters["default"].lora_A[...])
        return a @ a.T

    data = batches()
    half = [ids[:4] for ids in data]
    masked = components(data, lambda ids: np.arange(8)[:, None] < np.full((1, 9), 4))
    np.testing.assert_allclose(masked, components(half, None), rtol=1e-4, atol=1e-5)


def test_what_eva_cannot_do():
    model = Encoder(nnx.Rngs(0))
    with pytest.raises(LoraError, match="needs an adapter"):
        lora_flax.initialize_lora_eva_weights(model, batches(), lambda n, b: n(b))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["head"], init_lora_weights="eva"))
    with pytest.raises(LoraError, match="at least one batch"):
        lora_flax.initialize_lora_eva_weights(model, [], lambda n, b: n(b))
