"""Generation against transformers' `generate`, and the sampling rules against their formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import phi3_jax
from phi3_jax import UserError
from phi3_jax.generation.sampling import restrict
from tests.conftest import SHAPES, forward, tiny_hf_model


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gqa")
    tiny_hf_model(**SHAPES["gqa"]).save_pretrained(directory)
    return phi3_jax.load(directory)


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, 128, n).tolist() for n in lengths]


def test_greedy_equals_transformers(tmp_path, shape):
    theirs = tiny_hf_model(**shape)
    theirs.save_pretrained(tmp_path)
    ours = phi3_jax.load(tmp_path)
    length = 40 if "rope_scaling" in shape else 9  # LongRoPE: from beyond the original length
    (prompt,) = prompts(length)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None
    )[0, length:]
    assert phi3_jax.generate(ours, [prompt], max_new_tokens=64) == [expected.tolist()]


@pytest.mark.parametrize("name", ["sliding_window", "longrope", "gqa"])
def test_cached_decoding_equals_the_full_forward(tmp_path, name):
    tiny_hf_model(**SHAPES[name]).save_pretrained(tmp_path)
    model = phi3_jax.load(tmp_path)
    (prompt,) = prompts(12)
    (new,) = phi3_jax.generate(model, [prompt], max_new_tokens=12)
    logits = forward(model, np.array([prompt + new], np.int32))
    assert jnp.argmax(logits[0, len(prompt) - 1 : -1], axis=-1).tolist() == new


def test_alone_or_in_a_batch(gqa):
    texts = prompts(3, 70, 17)
    together = phi3_jax.generate(gqa, texts, max_new_tokens=16)
    assert together == [phi3_jax.generate(gqa, [t], max_new_tokens=16)[0] for t in texts]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
def test_streamed_tokens_are_those_of_generate(gqa, settings):
    (prompt,) = prompts(7)
    (whole,) = phi3_jax.generate(gqa, [prompt], 12, **settings)
    assert list(phi3_jax.stream(gqa, prompt, 12, **settings)) == whole
    stop = whole[4]
    streamed = list(phi3_jax.stream(gqa, prompt, 12, eos_ids=[stop], **settings))
    assert streamed == whole[: whole.index(stop) + 1]


def test_stops_at_any_stop_id(gqa):
    texts = prompts(5, 9)
    free = phi3_jax.generate(gqa, texts, max_new_tokens=16)
    stops = (free[0][3], free[1][7])
    for row, tokens in zip(phi3_jax.generate(gqa, texts, 16, eos_ids=stops), free, strict=True):
        end = next(i for i, token in enumerate(tokens) if token in stops)
        assert row == tokens[: end + 1]


def test_sampling_follows_the_seed(gqa):
    texts = prompts(5, 9)
    sample = [phi3_jax.generate(gqa, texts, 8, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert sample[0] == sample[1] != sample[2]
    assert phi3_jax.generate(gqa, texts, 8, temperature=1.0, top_k=1) == phi3_jax.generate(
        gqa, texts, 8
    )


def test_sampled_frequencies_follow_the_softmax(gqa):
    (prompt,) = prompts(5)
    drawn = phi3_jax.generate(gqa, [prompt] * 4000, 1, temperature=4.0, top_k=5, seed=3)
    logits = forward(gqa, np.array([prompt], np.int32))[0, -1]
    top = jnp.argsort(-logits)[:5]
    expected = jax.nn.softmax(logits[top] / 4.0)
    observed = np.array([[row[0] == int(token) for token in top] for row in drawn]).mean(axis=0)
    np.testing.assert_allclose(observed, expected, atol=4 * 0.5 / 4000**0.5)  # four sigma


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (20, 0.5), (3, 0.01)])
def test_restriction_equals_transformers_warpers(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 2
    expected = torch.from_numpy(logits)
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    np.testing.assert_array_equal(restrict(jnp.asarray(logits), top_k, top_p), expected.numpy())


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([], {}, "no prompts"),
        ([[5], []], {}, "prompt 1 is empty"),
        ([[5, 128]], {}, r"token ids \[128\] are outside the vocabulary of 128"),
        ([[5]], {"max_new_tokens": 256}, "exceed the model's 256 positions"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([[5]], {"temperature": -1.0}, "temperature must be at least 0, not -1.0"),
        ([[5]], {"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ([[5]], {"top_k": -1}, "top_k must be at least 0, not -1"),
        ([[5]], {"min_p": 2.0}, r"min_p must be in \[0, 1\], not 2.0"),
        ([[5]], {"repetition_penalty": 0.0}, "repetition_penalty must be above 0, not 0.0"),
    ],
)
def test_bad_input(gqa, texts, settings, message):
    with pytest.raises(UserError, match=message):
        phi3_jax.generate(gqa, texts, **settings)


@pytest.mark.parametrize("name", ["longrope", "longrope_partial_gqa"])
def test_crossing_the_original_length_equals_transformers(tmp_path, name):
    """The keys of a row that crosses are recomputed, as in transformers."""
    theirs = tiny_hf_model(**(SHAPES[name] | {"initializer_range": 0.2}))
    theirs.save_pretrained(tmp_path)
    (prompt,) = prompts(20)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None
    )[0, 20:].tolist()
    ours = phi3_jax.load(tmp_path)
    assert phi3_jax.generate(ours, [prompt], max_new_tokens=40) == [expected]


def test_rows_cross_each_at_its_own_time(tmp_path):
    """Beside rows that never cross, that crossed already, and that cross at other steps."""
    tiny_hf_model(**(SHAPES["longrope"] | {"initializer_range": 0.2})).save_pretrained(tmp_path)
    model = phi3_jax.load(tmp_path)
    texts = prompts(3, 20, 28, 40)
    together = phi3_jax.generate(model, texts, max_new_tokens=16)
    assert together == [phi3_jax.generate(model, [t], max_new_tokens=16)[0] for t in texts]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_transformers(tmp_path, penalty):
    theirs = tiny_hf_model(**(SHAPES["gqa"] | {"initializer_range": 0.2}))
    theirs.save_pretrained(tmp_path)
    (prompt,) = prompts(12)
    expected = theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=penalty,
    )[0, 12:].tolist()
    ours = phi3_jax.load(tmp_path)
    beside = prompts(3)[0]
    both = phi3_jax.generate(ours, [prompt, beside], 40, repetition_penalty=penalty)
    assert both[0] == expected


@pytest.mark.parametrize("min_p", [0.05, 0.5, 1.0])
def test_min_p_equals_transformers(min_p):
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 2
    expected = transformers.MinPLogitsWarper(min_p)(None, torch.from_numpy(logits))
    ours = restrict(jnp.asarray(logits), 0, 1.0, min_p)
    np.testing.assert_array_equal(ours, expected.numpy())
