"""SwiGLU's activation: the kernel of its gradient, interpreted, against plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.model import swiglu as module
from phi3_jax.model.swiglu import swiglu


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient(dtype, monkeypatch):
    """Several blocks, the last of which the rows do not fill."""
    monkeypatch.setattr(module, "BLOCK", (32, 128))
    gate_up = jax.random.normal(jax.random.key(0), (2, 35, 768)).astype(dtype)
    gradient = jax.random.normal(jax.random.key(1), (2, 35, 384)).astype(dtype)

    def run(kernel):
        y, pull = jax.vjp(lambda x: swiglu(x, kernel), gate_up)
        return y, *pull(gradient)

    for found, wanted in zip(run("interpreted"), run(None), strict=True):
        assert found.dtype == dtype and found.shape == wanted.shape
        found, wanted = (np.asarray(a, np.float32) for a in (found, wanted))
        bound = 1e-6 if dtype == jnp.float32 else 2**-7  # plain JAX rounds each operation
        assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


def test_widths_without_whole_registers_stay_with_xla():
    gate_up = jnp.ones((1, 4, 96))
    text = str(jax.make_jaxpr(jax.grad(lambda x: swiglu(x, "interpreted").sum()))(gate_up))
    assert "pallas_call" not in text
