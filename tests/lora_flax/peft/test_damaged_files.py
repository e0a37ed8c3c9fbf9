"""Adapter folders that nothing can be done with: one error that names the file and the problem."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax.nets import Listed, arrays

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    model = Listed(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["proj"]), rngs=nnx.Rngs(0))
    lora_flax.save_peft(model, tmp_path, task_type=None)
    return tmp_path


def refuse(folder, message: str) -> None:
    model = Listed(nnx.Rngs(0))
    before = arrays(model).keys()
    with pytest.raises(LoraError, match=message) as error:
        lora_flax.load_peft(model, folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert arrays(model).keys() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exclude_modules": "("}, "exclude_modules: '\\(' is not a regular expression"),
        ({"modules_to_save": ["("]}, "modules_to_save: '\\(' is not a regular expression"),
        ({"target_modules": "a{9999999999}"}, "target_modules: .* is not a regular expression"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern"),
        ({"trainable_token_indices": 0}, "trainable_token_indices must be token ids"),
        ({"r": 2**31}, "r is 2147483648, but A has at most 2 rows"),
        ({"r": 10**30}, "but A has at most 2 rows"),
        (
            {"rank_pattern": {"q_proj": 2**31}},
            "rank_pattern of 'q_proj' is 2147483648, but A has at most 2 rows",
        ),
        ({"r": 2.5}, "r must be an integer"),
        ({"r": None}, "r must be an integer"),
        ({"lora_dropout": None}, "lora_dropout must be a number"),
        ({"lora_alpha": None}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": 1e39}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number above 0"),
        ({"layers_to_transform": "x"}, "layers_to_transform must be"),
    ],
    ids=str,
)
def test_settings(folder, change, message):
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | change))
    refuse(folder, message)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 200_000, b'{"r": ' + b"9" * 5000 + b"}"], ids=len
)
def test_a_config_that_is_no_json_object(folder, content):
    (folder / CONFIG).write_bytes(content)
    refuse(folder, f"{CONFIG} (is not JSON|does not describe)")


@pytest.mark.parametrize("kind", [np.int32, np.int8, np.bool_])
def test_integer_tensors(folder, kind):
    tensors = load_file(folder / WEIGHTS)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].astype(kind)}, folder / WEIGHTS)
    refuse(folder, f"expected floating-point tensors, but {name} is {np.dtype(kind)}")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, None])
def test_damaged_tensors(folder, content):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-50] if content is None else content)
    refuse(folder, f"{WEIGHTS} is damaged")


@pytest.mark.parametrize("shape", [(), (0, 6), (12,), (1, 2, 6)], ids=str)
def test_odd_shapes(folder, shape):
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {min(tensors): np.ones(shape, np.float32)}, folder / WEIGHTS)
    refuse(folder, "does not fit the model; wrong shape")
