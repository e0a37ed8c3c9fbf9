"""Profiles: a program's text read line by line, its parts and phases, and the model's own FLOPs."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from phi3_jax import Phi3Config, UserError
from phi3_jax.model.attention import attention
from phi3_jax.model.blockwise import Tokens
from phi3_jax.planning.collectives import collective_bytes
from phi3_jax.planning.costs import Product, products
from phi3_jax.planning.hlo import Program
from phi3_jax.planning.parts import PARTS, PHASES, part_of, phase_of
from phi3_jax.planning.profile import model_flops, profile
from phi3_jax.planning.topology import CHIPS, devices_of
from tests.conftest import ROOT

# The shape of a step: two layer loops, one counted in its condition and one by XLA, and the loss's
# loop, which nobody counts; a kernel whose metadata spans lines, and a collective in a fusion's
# place.
HLO = (ROOT / "tests" / "fixtures" / "step.hlo").read_text()
V5E = CHIPS["v5e"]


def test_a_program_is_added_up():
    program = Program.parse(HLO)
    kernel = Product("jvp()/self_attn/attention", 131072 * 50, 10**6, kernel=True)
    found = profile(program, [kernel], V5E, needed=2e12, while_trips=4)
    slow = 10**6 / V5E.bandwidth * V5E.clock  # more than the 50 cycles of its products
    assert found.cycles == {
        ("down_proj", "forward"): 3200, ("rotary", "recomputed"): 35, ("copies", "update"): 55,
        ("loss", "backward"): 52 + 13, ("optimizer", "update"): 3,
        ("attention", "forward"): pytest.approx(slow),
    }  # fmt: skip
    assert found.kernels == pytest.approx(slow)
    assert found.ideal == {("attention", "forward"): pytest.approx(50, rel=0.01)}
    assert found.seconds * V5E.clock == pytest.approx(3358 + slow)
    assert found.utilization(0.02) == pytest.approx(2e12 / 0.02 / 197e12)
    # 32 times in the loop, and once in a branch.
    assert collective_bytes(program, 4) == {"all-gather": 33 * 128 * 128 * 2}


@pytest.mark.parametrize("text", ["", "HloModule x\n", "ENTRY %e (a: f32[]) -> f32[] {\n}\n", "}"])
def test_a_program_without_estimates(text):
    with pytest.raises(UserError, match="no estimates"):
        profile(Program.parse(text), [], V5E, 1.0, 1)


@pytest.mark.parametrize(
    ("name", "part", "phase"),
    [
        ("jit(f)/jvp()/self_attn/qkv_proj/lora/dropout/mul", "dropout", "forward"),
        ("jit(f)/transpose(jvp(mlp))/gate_up_proj/lora/dot_general", "LoRA", "backward"),
        ("jit(f)/transpose(jvp())/rematted_computation/mlp/mul", "SwiGLU", "recomputed"),
        ("jit(f)/jvp(loss)/while/transpose(jvp())/dot_general", "loss", "backward"),
        ("jit(f)/jvp()/my_mlp/rms_norms/x", "other", "forward"),
        ("", "other", "update"),
    ],
)
def test_names(name, part, phase):
    assert (part_of(name), phase_of(name)) == (part, phase)
    assert part in PARTS and phase in PHASES


def test_a_kernel_that_multiplies_in_a_branch():
    """Such as the blocks of splash attention; a branch of a kernel has effects, not results."""

    def kernel(x_ref, out_ref):
        @pl.when(pl.program_id(0) > 0)
        def _():
            out_ref[...] = x_ref[...] @ x_ref[...]

    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    call = pl.pallas_call(kernel, grid=(3,), out_shape=shape, interpret=True)
    (found,) = products(jax.make_jaxpr(call)(shape))
    assert found.kernel and found.flops == 3 * 2 * 8**3
    assert found.bytes == 2 * 4 * 8 * 128  # as a TPU stores them, in rows of 128


@pytest.mark.parametrize(("window", "blocks"), [(None, 10), (128, 7), (150, 9)])
def test_blocks_that_attention_does_not_compute_do_not_count(window, blocks):
    """Of 4 x 4 blocks; with a window the kernel's grid is narrower, and not full either."""
    tokens = Tokens(*[jax.ShapeDtypeStruct((1, 512), jnp.int32)] * 4)
    shape = jax.ShapeDtypeStruct((1, 512, 2, 16), jnp.float32)

    def run(q, k, v, tokens):
        def layer(x, _):
            return attention(x, k, v, tokens, window, True, "splash"), None

        return jax.lax.scan(layer, q, None, length=3)[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(run, argnums=(0, 1, 2)))(shape, shape, shape, tokens)
    found = [product.flops for product in products(jaxpr) if product.kernel]
    block = 2 * 128 * 128 * 16 * 2  # one product of two heads
    # Forward two products of each block, backward four for keys and values, three for queries.
    assert sorted(found) == [3 * count * blocks * block for count in (2, 3, 4)]


def test_a_kernel_states_its_own_cost_and_one_without_readers_costs_nothing():
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] @ x_ref[...]

    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    stated = pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=9)
    call = pl.pallas_call(kernel, out_shape=shape, cost_estimate=stated, interpret=True)

    def run(x):
        unused = call(x + 1).reshape(-1)  # JAX leaves its removal to XLA
        return call(x), unused.shape

    (found,) = products(jax.make_jaxpr(lambda x: run(x)[0])(shape))
    assert found.kernel and (found.flops, found.bytes) == (7, 9)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_the_flops_that_a_model_needs(window):
    shape = Phi3Config(
        vocab_size=10, hidden_size=8, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=2, sliding_window=window,
    )  # fmt: skip
    pairs = sum(0 <= q - k < (window or 100) for q, k in itertools.product(range(7), repeat=2))
    weights = 2 * (8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 6) + 80
    assert model_flops(shape, 5, 7) == 5 * (4 * weights * 7 + 3 * 2 * 2 * 2 * 4 * 2 * pairs)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")  # the cache's programs for a TPU cannot be read without
@jax.default_matmul_precision("default")
def test_a_compiled_scan_is_counted_by_its_length():
    pytest.importorskip("libtpu", reason="the compiler for TPUs: pip install 'phi3-jax[tpu]'")
    sharding = jax.sharding.SingleDeviceSharding(devices_of("v5e:1x1")[0])

    def run(x, w):
        with jax.named_scope("mlp"):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    cycles = []
    for length in (5, 10):
        shapes = ((2048, 2048), (length, 2048, 2048))
        args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes]
        text = jax.jit(run).lower(*args).compile().as_text()
        found = profile(Program.parse(text), [], V5E, 1.0, 1)
        cycles.append(found.cycles["SwiGLU", "update"])
    assert cycles[1] == pytest.approx(2 * cycles[0], rel=0.01)
    assert cycles[1] == pytest.approx(10 * 2 * 2048**3 / V5E.flops * V5E.clock, rel=0.15)
