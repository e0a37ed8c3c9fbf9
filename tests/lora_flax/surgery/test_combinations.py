"""Adapters combined into one, against PEFT's `add_weighted_adapter`."""

import numpy as np
import peft
import pytest
from flax import nnx

import lora_flax
from tests.lora_flax.encoder import Encoder, peft_model, shake_torch, tokens, torch_output

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
