"""Attention in blocks against torch's, value and gradients; its memory; the TPU kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from phi3_jax import UserError
from phi3_jax.config.data import DataConfig
from phi3_jax.config.sections import ModelConfig
from phi3_jax.model import attention as module
from phi3_jax.model import blockwise
from phi3_jax.model.attention import attention
from phi3_jax.model.blockwise import Tokens
from phi3_jax.model.config import Phi3Config
from phi3_jax.platform import attn_implementation
from phi3_jax.sharding.mesh import make_mesh
from tests.conftest import tiny_hf_model

pytestmark = pytest.mark.usefixtures("compiled_anew")


def inputs(rows: int, length: int, heads: int, kv_heads: int, size: int, keys: int | None = None):
    rng = np.random.default_rng(0)
    shapes = [(length, heads), (keys or length, kv_heads), (keys or length, kv_heads)]
    return [rng.standard_normal((rows, *s, size)).astype(np.float32) for s in shapes]


def packed(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows with three examples and padding, unlike in each row."""
    positions, segments = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        ends = [0, length // 4 + row, length // 2 + 3 * row, length - 7 - row]
        for segment, (start, end) in enumerate(zip(ends, ends[1:], strict=False), start=1):
            segments[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
    return positions, segments


def torchs(query, key, value, tokens: Tokens, window: int | None, d_out) -> list[np.ndarray]:
    """Output and gradients of `scaled_dot_product_attention` under the mask written out."""
    distance = np.asarray(tokens.query_positions)[:, :, None] - tokens.key_positions[:, None]
    mask = np.asarray(tokens.query_segments)[:, :, None] == tokens.key_segments[:, None]
    mask &= (distance >= 0) & (tokens.key_segments != 0)[:, None]
    if window is not None:
        mask &= distance < window
    q, k, v = (torch.tensor(a).transpose(1, 2).requires_grad_() for a in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.tensor(mask)[:, None], enable_gqa=True
    )
    out.backward(torch.tensor(d_out).transpose(1, 2))
    return [a.detach().transpose(1, 2).numpy() for a in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads"), [(24, 2, 2), (300, 4, 2), (512, 4, 4), (2309, 2, 1)]
)
def test_values_and_gradients_are_torchs(length, heads, kv_heads, window, monkeypatch):
    if length > 1000:
        monkeypatch.setattr(blockwise, "SCORES", 2**17)  # pieces of several blocks, and a remainder
        pieces = list(blockwise._pieces((None, True), length))
        assert pieces[0].blocks > 1 and pieces[-1].size != pieces[0].size
    query, key, value = inputs(2, length, heads, kv_heads, 16)
    positions, segments = packed(2, length)
    tokens = Tokens(positions, segments, positions, segments)
    real = (segments != 0)[..., None, None]
    d_out = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32) * real

    @jax.jit
    def run(query, key, value):
        out, pull = jax.vjp(lambda *a: attention(*a, tokens, window, True), query, key, value)
        return out, *pull(d_out)

    out, *gradients = run(query, key, value)
    assert np.isfinite(out).all()
    expected, *wanted = torchs(query, key, value, tokens, window, d_out)
    np.testing.assert_allclose(out * real, np.nan_to_num(expected) * real, rtol=0, atol=1e-5)
    for found, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, want, rtol=0, atol=2e-5)


def test_keys_of_a_cache():
    """Queries that are not the keys: slots that hold nothing yet, other positions in each row."""
    query, key, value = inputs(2, 3, 4, 2, 8, keys=20)
    query_positions = np.array([[7, 8, 9], [4, 5, 6]], np.int32)
    key_positions = np.stack([np.arange(20), np.arange(20) - 3]).astype(np.int32)
    key_segments = ((key_positions >= 0) & (np.arange(20) < 10)).astype(np.int32)
    tokens = Tokens(query_positions, np.ones((2, 3), np.int32), key_positions, key_segments)
    out = attention(query, key, value, tokens, None, in_order=False)
    expected = torchs(query, key, value, tokens, None, np.zeros_like(query))[0]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_memory_does_not_grow_with_the_square_of_the_length():
    def temporary(length: int) -> int:
        q, k, v = (jax.ShapeDtypeStruct((1, length, n, 64), jnp.float32) for n in (8, 8, 8))
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, p, s):
            return attention(q, k, v, Tokens(p, s, p, s), None, True).sum()

        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return step.lower(q, k, v, ids, ids).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(4096), temporary(16384)
    assert long < 5 * short
    assert long < 8 * 16384**2 * 4 / 10  # a tenth of the scores, of which there are several


def assert_kernel_agrees(kernel: str, query, key, value, tokens, window, mesh) -> None:
    """Value and gradients of a kernel and of blocks, where there is a token, 1e-5 of their size."""
    real = (tokens.query_segments != 0)[..., None, None].astype(np.float32)

    def run(implementation):
        def loss(*arrays):
            out = attention(*arrays, tokens, window, True, implementation) * real
            return (out**2).sum(), out

        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        if mesh is None:
            return jax.tree.leaves(run(query, key, value))
        with jax.set_mesh(make_mesh(*mesh)):
            return jax.tree.leaves(run(query, key, value))

    for found, want in zip(run(kernel), run("xla"), strict=True):
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("mesh", [None, (1, 2, 2)], ids=["one device", "mesh"])
@pytest.mark.parametrize("window", [None, 100])
def test_the_tpu_kernel_agrees(window, mesh):
    """Splash attention, interpreted."""
    positions, segments = packed(2, 256)
    tokens = Tokens(positions, segments, positions, segments)
    arrays = inputs(2, 256, 4, 2, 96)
    assert_kernel_agrees("splash_interpreted", *arrays, tokens, window, mesh)


@pytest.mark.parametrize("mesh", [None, (2, 1, 2)], ids=["one device", "mesh"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_what_cudnn_is_told_is_the_same_rule(rows, window, mesh, monkeypatch):
    """cuDNN runs on GPUs alone; the same call to JAX, with the same masks, runs here on XLA."""
    kernel = "cudnn_packed" if rows == "packed" else "cudnn"
    call = functools.partial(module._KERNELS[kernel].func, packed=rows == "packed", backend="xla")
    monkeypatch.setitem(module._KERNELS, kernel, call)
    positions, segments = packed(2, 256)
    if rows == "padded":
        positions = np.broadcast_to(np.arange(256, dtype=np.int32), (2, 256))
        segments = (positions < np.array([[256], [200]])).astype(np.int32)
    tokens = Tokens(positions, segments, positions, segments)
    assert_kernel_agrees(kernel, *inputs(2, 256, 4, 2, 32), tokens, window, mesh)


def network(**shape) -> Phi3Config:
    return Phi3Config.from_hf(tiny_hf_model(**shape).config.to_dict())


def test_the_setting():
    shape = network()

    def chosen(platform: str, name: str = "auto", dtype: str = "auto", **data) -> str:
        model = ModelConfig(path="p", attn_implementation=name, dtype=dtype)
        rows = DataConfig(path="d", **{"max_length": 512} | data)
        return attn_implementation(model, rows, 8, shape, platform)

    assert [chosen(p) for p in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    assert chosen("gpu", packing=True) == "cudnn_packed" == chosen("gpu", "cudnn", packing=True)
    assert chosen("tpu", "xla") == "xla" == chosen("tpu", max_length=500)
    assert chosen("gpu", "xla") == "xla" == chosen("gpu", "auto", "float32")
    # The mask of packed rows would take more than a GiB: auto goes through in blocks.
    assert chosen("gpu", packing=True, max_length=16384) == "xla"
    assert chosen("gpu", "cudnn", packing=True, max_length=16384) == "cudnn_packed"
    with pytest.raises(UserError, match="a TPU kernel, and this is a CPU"):
        chosen("cpu", "splash")
    with pytest.raises(UserError, match="data.pad_to_multiple_of 64 is not a multiple of 128"):
        chosen("tpu", "splash", pad_to_multiple_of=64)
    with pytest.raises(UserError, match="a GPU kernel, and this is a TPU"):
        chosen("tpu", "cudnn")
    with pytest.raises(UserError, match="needs a 16-bit dtype, and model.dtype is float32"):
        chosen("gpu", "cudnn", "float32")
    shape = network(head_dim=20)
    assert chosen("gpu") == "xla"
    with pytest.raises(UserError, match="head_dim 20 is not a multiple of 8 up to 128"):
        chosen("gpu", "cudnn")
