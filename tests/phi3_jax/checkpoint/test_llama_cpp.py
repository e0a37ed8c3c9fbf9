"""Adapters in llama.cpp itself, as its own converter makes them of PEFT's form.

The next tokens and their log-probabilities are this program's.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import lora_flax
import phi3_jax
from tests.conftest import SHAPES, forward, tiny_hf_model
from tests.phi3_jax.checkpoint import converter
from tests.phi3_jax.export.llama_cpp import LlamaCpp

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "whole layers": {"target_modules": "all-linear"},
    "slices": {"target_modules": ["q_proj", "up_proj"]},
    "the guide's seven": {"target_modules": SEVEN, "use_rslora": True},
    "one layer": {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [1]},
    "ranks of one scale": {
        "target_modules": ["qkv_proj", "o_proj"],
        "rank_pattern": {"o_proj": 6},
        "alpha_pattern": {"o_proj": 9},
    },
    "ranks of different scales": {
        "target_modules": ["qkv_proj", "o_proj"],
        "rank_pattern": {"o_proj": 6},
    },
}
PROMPTS = [[1, 17, 99, 4, 63], [1, 5], [1, *range(20, 50)]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    @functools.cache
    def base(shape: str):
        """The folder of a tiny model, which also holds its GGUF file."""
        folder = tmp_path_factory.mktemp(shape)
        model = tiny_hf_model(**(SHAPES[shape] | {"initializer_range": 0.15}))
        model.save_pretrained(folder)
        converter.write_model(model, folder / "base.gguf")
        return folder

    return base


def expected(model: phi3_jax.Phi3, prompt: list[int]) -> np.ndarray:
    logits = forward(model, np.array([prompt], np.int32))[0, -1]
    return np.asarray(jax.nn.log_softmax(logits))


def compare(model: phi3_jax.Phi3, folder, adapter=None) -> None:
    server = LlamaCpp(folder / "base.gguf", adapter)
    for prompt in PROMPTS:
        (top,) = server.greedy(prompt, 1, 5)
        ours = expected(model, prompt)
        assert list(top) == list(np.argsort(-ours)[:5])
        np.testing.assert_allclose(list(top.values()), ours[list(top)], rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_the_base_is_the_same(bases, shape):
    compare(phi3_jax.load(bases(shape)), bases(shape))


@pytest.mark.parametrize(
    ("shape", "case"), [*(("gqa", case) for case in CASES), ("tied", "slices")]
)
def test_an_adapter_is_the_same(bases, shape, case, tmp_path):
    base = bases(shape)
    model = phi3_jax.load(base)
    before = expected(model, PROMPTS[0])
    lora_flax.wrap(model, lora_flax.LoraConfig(r=2, lora_alpha=3, **CASES[case]))
    rng = np.random.default_rng(0)
    trained = nnx.state(model, nnx.LoRAParam)
    moved = jax.tree.map(lambda a: np.asarray(0.2 * rng.normal(size=a.shape), np.float32), trained)
    nnx.update(model, moved)
    lora_flax.save_peft(model, tmp_path)
    loaded = phi3_jax.load(base)
    lora_flax.load_peft(loaded, tmp_path)  # without what randomness put into the padding
    assert abs(expected(loaded, PROMPTS[0]) - before).max() > 0.1
    converter.write_adapter(tmp_path, tmp_path / "adapter.gguf")
    compare(loaded, base, tmp_path / "adapter.gguf")
