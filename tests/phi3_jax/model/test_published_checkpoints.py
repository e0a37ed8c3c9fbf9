"""Every `model_type: phi3` checkpoint's own config.json, narrow and shallow, against transformers.

What is kept of each: head size, the ratio of query to key heads, the MLP's proportion, all rotary
settings with their real factor lists and real original length, the sliding window, tying. So texts
of 4,100 tokens are on the far side of the original length and of the window.
"""

from __future__ import annotations

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import phi3_jax
from phi3_jax import Phi3Config
from phi3_jax.checkpoint.names import tensor_table
from tests.conftest import ROOT, forward

FIXTURES = ROOT / "tests" / "fixtures" / "checkpoints"
NAMES = sorted(file.stem for file in FIXTURES.glob("*.json"))
VOCAB = 256
BEYOND = 4100


def published(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def narrow(name: str) -> dict:
    """The checkpoint in its proportions: one key head's group of query heads, two layers."""
    raw = published(name)
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    heads = raw["num_attention_heads"] // raw["num_key_value_heads"]
    kv_heads = 1
    if heads == 1:
        heads = kv_heads = 2
    hidden = head_dim * heads
    ratio = raw["intermediate_size"] / raw["hidden_size"]
    return raw | {
        "hidden_size": hidden,
        "intermediate_size": int(hidden * ratio),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB,
        "initializer_range": 2.0 / hidden**0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def as_transformers(raw: dict) -> transformers.Phi3Config:
    """transformers 5.23 fails on the name `su` itself: it fills in what longrope needs by name."""
    raw = copy.deepcopy(raw)  # it changes what it is given
    if raw["rope_scaling"]:
        raw["rope_scaling"]["type"] = "longrope"
    raw.pop("torch_dtype")
    return transformers.Phi3Config(**raw)


# Checkpoints that differ in their weights or in spelling alone are one network, tested once.
NETWORKS = {Phi3Config.from_hf(narrow(name)): name for name in reversed(NAMES)}
DISTINCT = sorted(NETWORKS.values())
LONGROPE_NAMES = [name for config, name in NETWORKS.items() if config.longrope]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(name)`: the same random weights in transformers and here, made once."""
    made: dict[str, tuple] = {}

    def get(name: str) -> tuple[transformers.Phi3ForCausalLM, phi3_jax.Phi3]:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            theirs = transformers.Phi3ForCausalLM(as_transformers(narrow(name))).eval()
            theirs.save_pretrained(directory)
            # The published spelling, not the one that transformers has just written.
            (directory / "config.json").write_text(json.dumps(narrow(name)))
            made[name] = theirs, phi3_jax.load(directory)
        return made[name]

    return get


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, shape, dtype=np.int32)


def hf_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("name", NAMES)
def test_published_and_new_spelling_are_one_config(name):
    raw = published(name)
    new = json.loads(as_transformers(raw).to_json_string())
    assert "rope_parameters" in new and "rope_theta" not in new
    assert Phi3Config.from_hf(new) == Phi3Config.from_hf(raw)
    assert Phi3Config.from_hf(Phi3Config.from_hf(raw).to_hf()) == Phi3Config.from_hf(raw)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", DISTINCT)
def test_logits_on_both_sides_of_the_original_length(pair, name):
    theirs, ours = pair(name)
    for length in (64, BEYOND):
        tokens = random_tokens(1, length)
        expected = hf_logits(theirs, tokens)
        assert 5 < np.abs(expected).max() < 50
        np.testing.assert_allclose(forward(ours, tokens), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", DISTINCT)
def test_gradients(pair, name):
    """Relative L2 1e-4 per weight, of the mean next-token loss."""
    theirs, ours = pair(name)
    tokens = random_tokens(2, 48)
    theirs.zero_grad()
    torch_tokens = torch.from_numpy(tokens).long()
    theirs(torch_tokens, labels=torch_tokens).loss.backward()
    graphdef, state = nnx.split(ours)

    def loss(state):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))

    grads = {tuple(map(str, p)): g for p, g in nnx.to_flat_state(jax.jit(jax.grad(loss))(state))}
    expected = dict(theirs.named_parameters())
    for tensor in tensor_table(ours):
        value = np.asarray(grads[tensor.path][...])
        value = value if tensor.layer is None else value[tensor.layer]
        want = expected[tensor.name].grad.numpy()
        error = np.linalg.norm((value.T if tensor.transpose else value) - want)
        assert error < 1e-4 * np.linalg.norm(want), tensor.name


def assert_same_greedy_tokens(theirs, ours, length: int, new: int) -> None:
    prompt = random_tokens(length).tolist()
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None
    )[0, length:]
    assert phi3_jax.generate(ours, [prompt], max_new_tokens=new) == [expected.tolist()]


@pytest.mark.parametrize("name", DISTINCT)
def test_greedy_generation(pair, name):
    assert_same_greedy_tokens(*pair(name), length=20, new=64)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONGROPE_NAMES)
def test_greedy_generation_across_the_original_length(pair, name):
    """The 4,097th token changes the factors of all tokens before it."""
    assert_same_greedy_tokens(*pair(name), length=4090, new=14)


@pytest.mark.parametrize("name", ["Phi-3.5-mini-instruct", "Phi-4-mini-instruct"])
def test_longrope_by_batch_is_transformers_way(pair, name):
    """A short row beside a long one: the long factors in transformers, its own here."""
    theirs, ours = pair(name)
    tokens = random_tokens(2, BEYOND)
    mask = np.ones_like(tokens)
    mask[0, 100:] = 0
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask)
        ).logits.numpy()
    positions = np.broadcast_to(np.arange(BEYOND, dtype=np.int32), tokens.shape)
    config = ours.config
    other = phi3_jax.Phi3(config.with_rope_factors("by_batch"), rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(ours))
    logits = np.asarray(forward(other, tokens, positions, mask))
    np.testing.assert_allclose(logits[1], expected[1], rtol=0, atol=2e-4)
    np.testing.assert_allclose(logits[0, :100], expected[0, :100], rtol=0, atol=2e-4)
    own = np.asarray(forward(ours, tokens, positions * mask, mask))
    assert np.abs(own[0, :100] - expected[0, :100]).max() > 0.1
