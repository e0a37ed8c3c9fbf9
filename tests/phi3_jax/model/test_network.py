"""The network against transformers, on every shape that Phi-3 has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import phi3_jax
from phi3_jax.checkpoint.names import tensor_table
from phi3_jax.checkpoint.saving import hf_array
from phi3_jax.model.blockwise import Tokens
from tests.conftest import LONGROPE, SHAPES, forward, tiny_hf_model

LOGIT_BOUND = 2e-4  # on logits of size ~10, float32


def both(tmp_path, **overrides):
    """The same random weights in transformers and here."""
    theirs = tiny_hf_model(**overrides)
    theirs.save_pretrained(tmp_path)
    return theirs, phi3_jax.load(tmp_path)


def random_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 128, (batch, length), dtype=np.int32)


def hf_logits(model, tokens: np.ndarray, **kwargs) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), **kwargs).logits.numpy()


@pytest.mark.parametrize("length", [20, 48], ids=["below_original", "above_original"])
def test_logits(tmp_path, shape, length):
    theirs, ours = both(tmp_path, **shape)
    tokens = random_tokens(2, length)
    expected = hf_logits(theirs, tokens)
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(forward(ours, tokens), expected, rtol=0, atol=LOGIT_BOUND)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["plain", "sliding_window", "gqa"])
def test_padding_side_does_not_matter(tmp_path, name, side):
    _, ours = both(tmp_path, **SHAPES[name])
    tokens = random_tokens(1, 20)
    pad = ((0, 0), (5, 0)) if side == "left" else ((0, 0), (0, 5))
    padded = np.pad(tokens, pad, constant_values=77)
    segment_ids = np.pad(np.ones_like(tokens), pad)
    positions = np.pad(np.arange(20, dtype=np.int32)[None], pad)
    logits = np.asarray(forward(ours, padded, positions, segment_ids))
    assert np.isfinite(logits).all()
    alone = forward(ours, tokens)[0]
    np.testing.assert_allclose(logits[segment_ids == 1], alone, rtol=0, atol=LOGIT_BOUND)


@pytest.mark.parametrize("name", ["plain", "sliding_window", "longrope"])
def test_packed_segments_do_not_see_each_other(tmp_path, name):
    """A packed row gives each text the logits it has alone, LongRoPE's factors included."""
    _, ours = both(tmp_path, **SHAPES[name])
    texts = [random_tokens(1, n) + i for i, n in enumerate((20, 40, 7))]
    packed = np.concatenate(texts, axis=1)
    segment_ids = np.concatenate([np.full_like(t, i + 1) for i, t in enumerate(texts)], axis=1)
    positions = np.concatenate([np.arange(t.shape[1], dtype=np.int32) for t in texts])[None]
    logits = np.asarray(forward(ours, packed, positions, segment_ids))
    alone = np.concatenate([np.asarray(forward(ours, t)) for t in texts], axis=1)
    np.testing.assert_allclose(logits, alone, rtol=0, atol=LOGIT_BOUND)


def test_longrope_row_does_not_depend_on_its_batch(tmp_path):
    """transformers gives a short text other logits beside a long one; here it keeps its own."""
    theirs, ours = both(tmp_path, **LONGROPE)
    short = random_tokens(1, 20)
    batch = np.concatenate([np.pad(short, ((0, 0), (0, 28))), random_tokens(1, 48)])
    segment_ids = np.ones_like(batch)
    segment_ids[0, 20:] = 0
    positions = np.where(segment_ids, np.arange(48, dtype=np.int32), 0)
    logits = forward(ours, batch, positions, segment_ids)
    np.testing.assert_allclose(logits[0, :20], forward(ours, short)[0], rtol=0, atol=LOGIT_BOUND)
    np.testing.assert_allclose(
        logits[0, :20], hf_logits(theirs, short)[0], rtol=0, atol=LOGIT_BOUND
    )
    assert np.abs(hf_logits(theirs, batch)[0, :20] - logits[0, :20]).max() > 0.1


def test_remat_and_scan_change_nothing(tmp_path):
    """Rematerialized = kept; scanned = the layers called one by one."""
    _, ours = both(tmp_path, **SHAPES["gqa"])
    tokens = random_tokens(2, 16)
    plain = ours(tokens)
    np.testing.assert_allclose(ours(tokens, remat="full"), plain, rtol=0, atol=LOGIT_BOUND)

    graphdef, state = nnx.split(ours.model.layers)
    positions, segment_ids = phi3_jax.model.rope.default_positions(tokens, None, None)
    rotary = phi3_jax.model.rope.rotary_tables(ours.config, positions, segment_ids)
    attended = Tokens(positions, segment_ids, positions, segment_ids)
    x = ours.model.embed_tokens(tokens)
    for i in range(ours.config.num_hidden_layers):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        x, _ = layer(x, rotary, attended, jnp.int32(i), None, None)
    np.testing.assert_allclose(ours.head(ours.model.norm(x)), plain, rtol=0, atol=LOGIT_BOUND)


def test_gradients_of_all_weights(tmp_path):
    """Relative L2 1e-4 per weight, of the mean next-token loss."""
    theirs, ours = both(tmp_path, **SHAPES["longrope_partial_gqa"])
    tokens = random_tokens(2, 40)
    torch_tokens = torch.from_numpy(tokens).long()
    theirs(torch_tokens, labels=torch_tokens).loss.backward()
    graphdef, state = nnx.split(ours)

    def loss(state):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens, remat="full")[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))

    grads = {tuple(map(str, p)): g for p, g in nnx.to_flat_state(jax.jit(jax.grad(loss))(state))}
    expected = dict(theirs.named_parameters())
    for tensor in tensor_table(ours):
        value = hf_array(tensor, grads[tensor.path][...], np.dtype(np.float32))
        want = expected[tensor.name].grad.numpy()
        error = np.linalg.norm(value - want) / np.linalg.norm(want)
        assert error < 1e-4, (tensor.name, error)


def test_bfloat16_close_to_transformers(tmp_path):
    """Same rounding points as transformers, so that errors are of one rounding, not of a bug."""
    theirs = tiny_hf_model(initializer_range=0.1).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = phi3_jax.load(tmp_path, dtype=jnp.bfloat16)
    tokens = random_tokens(2, 24)
    expected = hf_logits(theirs.float(), tokens)
    logits = np.asarray(forward(ours, tokens))
    assert logits.dtype == np.float32
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.03


def test_random_initialization_has_the_configured_spread():
    config = phi3_jax.Phi3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    model = phi3_jax.Phi3(config, rngs=nnx.Rngs(0))
    kernel = model.model.layers.mlp.down_proj.kernel[...]
    assert kernel.shape == (4, 512, 256)
    np.testing.assert_allclose(kernel.std(axis=(1, 2)), 0.02, rtol=0.02)
    assert not jnp.array_equal(kernel[0], kernel[1])


def test_tree_mode():
    """Flax is to drop its graph mode; the network must run without it."""
    config = phi3_jax.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    tokens = np.arange(10, dtype=np.int32)[None]
    expected = phi3_jax.Phi3(config, rngs=nnx.Rngs(0))(tokens)
    with nnx.set_graph_mode(False):
        model = phi3_jax.Phi3(config, rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(model(tokens), expected)
