"""Adapters combined into one, against PEFT's `add_weighted_adapter`."""

import numpy as np
import peft
import pytest
from flax import nnx

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax.encoder import (
    Encoder,
    peft_model,
    shake_torch,
    to_torch,
    tokens,
    torch_output,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*embedding layer", "ignore:.*config file")


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_weighted_combination(kind, weights, tmp_path):
    model = Encoder(nnx.Rngs(0))
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["qkv_proj", "embed_tokens", "head"]}
    twin = peft_model(model, **fields)
    twin.add_adapter("other", peft.LoraConfig(**fields | {"lora_alpha": 5}))
    for seed, name in enumerate(("default", "other")):
        twin.set_adapter(name)
        shake_torch(twin, seed)
    twin.save_pretrained(str(tmp_path))
    lora_flax.load_peft(model, tmp_path)
    lora_flax.load_peft(model, tmp_path / "other", adapter_name="other")
    names = ["default", "other"]
    twin.add_weighted_adapter(names, list(weights), "both", combination_type=kind)
    twin.set_adapter("both")
    lora_flax.add_weighted_adapter(model, names, weights, "both", combination_type=kind)
    lora_flax.set_adapter(model, "both")
    np.testing.assert_allclose(model(tokens()), torch_output(twin), rtol=1e-4, atol=1e-4)
    lora_flax.save_peft(model, tmp_path / "both", adapter_name="both")
    other = Encoder(nnx.Rngs(0))
    lora_flax.load_peft(other, tmp_path / "both")
    np.testing.assert_allclose(other(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)


def test_cat_is_exact_and_svd_is_the_best(pair):
    model, _ = pair
    lora_flax.delete_adapter(model, "two")
    lora_flax.add_weighted_adapter(model, ["one", "three"], [1, 1], "cat", "cat")
    lora_flax.add_weighted_adapter(model, ["one", "three"], [1, 1], "svd", "svd", svd_rank=5)
    lora_flax.set_adapter(model, ["one", "three"])
    out = model(tokens())
    for name in ("cat", "svd"):  # rank 5 of 6 holds the sum of two of rank 2
        lora_flax.set_adapter(model, name)
        np.testing.assert_allclose(model(tokens()), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_subtracted_start_counts(kind, start, tmp_path):
    """The start doubles the rank: cat and svd hold all of it, also in PEFT's file."""
    model = Encoder(nnx.Rngs(0))
    twin = to_torch(model)
    fields = {"r": 2, "lora_alpha": 4, "init_lora_weights": start}
    targets = ["q_proj", "v_proj", "up_proj"]
    lora_flax.wrap(model, LoraConfig(target_modules=targets, **fields), adapter_name="one")
    plain = model(tokens())
    lora_flax.add_weighted_adapter(model, ["one"], [1.0], "same", kind)
    lora_flax.set_adapter(model, "same")
    np.testing.assert_allclose(model(tokens()), plain, rtol=1e-5, atol=1e-5)
    lora_flax.set_adapter(model, "one")
    trained(model)
    out = model(tokens())
    lora_flax.add_weighted_adapter(model, ["one"], [1.0], "copy", kind)
    lora_flax.set_adapter(model, "copy")
    np.testing.assert_allclose(model(tokens()), out, rtol=1e-4, atol=1e-4)
    lora_flax.save_peft(model, tmp_path, task_type=None)
    loaded = peft.PeftModel.from_pretrained(twin, str(tmp_path))
    np.testing.assert_allclose(torch_output(loaded), out, rtol=1e-4, atol=1e-4)


def test_the_first_config_is_kept():
    model = Encoder(nnx.Rngs(0))
    config = LoraConfig(r=2, lora_dropout=0.1, use_rslora=True, target_modules=["up_proj"])
    lora_flax.wrap(model, config, adapter_name="one")
    lora_flax.add_weighted_adapter(model, ["one"], [0.5], "half", "cat")
    fields = lora_flax.to_peft(model, adapter_name="half").config
    assert (fields["lora_dropout"], fields["r"], fields["lora_alpha"]) == (0.1, 2, 2)


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"init_lora_weights": "pissa"}, "linear", "start is subtracted .*use cat or svd"),
        ({"modules_to_save": ["head"]}, "cat", "weights of its own for head"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "svd", "for embed_tokens"),
        ({"bias": "lora_only"}, "cat", "trained biases cannot be combined"),
        ({"use_dora": True}, "cat", "use_dora"),
    ],
)
def test_more_than_a_and_b_is_refused(fields, kind, said):
    model = Encoder(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["up_proj"], **fields))
    with pytest.raises(LoraError, match=said):
        lora_flax.add_weighted_adapter(model, ["default"], [1.0], "new", kind)
    assert lora_flax.adapter_names(model) == ["default"]


def test_svd_rank_is_checked(pair):
    model, _ = pair
    for rank, said in ((0, "at least 1"), (7, "exceeds the smaller side of a weight: 6")):
        with pytest.raises(LoraError, match=said):
            lora_flax.add_weighted_adapter(model, ["one"], [1], "new", "svd", svd_rank=rank)
