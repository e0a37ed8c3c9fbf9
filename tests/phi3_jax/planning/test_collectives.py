"""Collectives of compiled programs: what is started, what is carried along, what is waited for."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phi3_jax.planning.collectives import collective_bytes, overlap
from phi3_jax.planning.hlo import Program
from phi3_jax.planning.profile import profile
from phi3_jax.planning.topology import CHIPS, devices_of, mean_hops

# One loop of three rounds. In each a gather of 100 bytes is started, carried along by a product and
# waited for, and a permutation of 40 bytes runs beside it; a reduction at the end has no company.
HLO = """
%start (p: s8[25]) -> (s8[25], s8[100]) {
  %p = s8[25]{0} parameter(0)
  %ag.1 = s8[100]{0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %c.1 = (s8[25]{0}, s8[100]{0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.2: s8[25], p.3: f32[8]) -> f32[8] {
  %ag.2 = s8[100]{0} all-gather(%p.2), channel_id=7, dimensions={0}
  ROOT %dot = f32[8]{0} convolution(%p.3, %p.3), metadata={op_name="jit(f)/jvp()/mlp/dot_general"}
}

%done (p.4: s8[100]) -> s8[100] {
  %ag.3 = s8[100]{0} all-gather(%p.4), channel_id=7, dimensions={0}
  ROOT %c.2 = s8[100]{0} custom-call(%ag.3), custom_call_target="AsyncCollectiveDone"
}

%body (b: (s32[], s8[25])) -> (s32[], s8[25]) {
  %f.1 = (s8[25]{0}, s8[100]{0}) fusion(%x), kind=kCustom, calls=%start
  %cp = (s8[40]{0}, s8[40]{0}) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  %f.2 = f32[8]{0} fusion(%x, %z), kind=kOutput, calls=%async_collective_fusion.1, ESTIMATE(60)
  %f.3 = s8[100]{0} fusion(%f.1), kind=kCustom, calls=%done
  %other = f32[8]{0} multiply(%z, %z), metadata={op_name="jit(f)/jvp()/mlp/mul"}, ESTIMATE(25)
  %cpd = s8[40]{0} collective-permute-done(%cp)
  ROOT %t = (s32[], s8[25]) tuple(%i, %x)
}

ENTRY %main (a: s8[25]) -> s8[25] {
  %w = (s32[], s8[25]) while(%t), condition=%lost, body=%body, known_trip_count":{"n":"3"}
  %operand = s8[200]{0} add(%a, %a), ESTIMATE(5)
  ROOT %rs = s8[50]{0} reduce-scatter(%operand), channel_id=9, dimensions={0}
}
"""


def program() -> Program:
    parts = HLO.split("ESTIMATE(")
    text = parts[0] + "".join(
        f'backend_config={{"estimated_cycles":"{cycles}"}}{rest}'
        for cycles, rest in (part.split(")", 1) for part in parts[1:])
    )
    return Program.parse(text)


def test_bytes_of_every_kind():
    """Each collective once, however many fusions carry it; a reduction by what it reads."""
    found = collective_bytes(program())
    assert found == {"all-gather": 3 * 100, "collective-permute": 3 * 40, "reduce-scatter": 200}


def test_what_is_hidden_is_the_work_between_start_and_end():
    """At a cycle a byte: the gather has 60 of its 100 cycles, then the permutation 25 of its 40."""
    v5e = CHIPS["v5e"]
    found = profile(program(), [], v5e, 1.0, 1)
    assert found.cycles == {("SwiGLU", "forward"): 3 * 85, ("other", "update"): 5}
    beside = overlap(program(), lambda i: float(ESTIMATES.get(i.label, 0)), 1.0)
    assert beside.total == 3 * 140 + 200
    assert beside.exposed == 3 * (40 + 15) + 200
    assert beside.hidden == pytest.approx(1 - 365 / 620)
    per_byte = v5e.clock / v5e.interconnect
    assert found.overlap.total == pytest.approx(620 * per_byte)
    assert found.overlap.exposed == pytest.approx(200 * per_byte)  # fast enough for all but that
    waits = found.seconds_with_collectives - found.seconds
    assert waits == pytest.approx(200 / v5e.interconnect)


def test_an_all_to_all_crosses_several_links():
    text = """
ENTRY %main (a: s8[96]) -> s8[96] {
  %sent = s8[96]{0} all-to-all(%a), channel_id=1, dimensions={0}
  ROOT %rs = s8[24]{0} reduce-scatter(%sent), channel_id=2, dimensions={0}
}
"""
    sides = {(4, 4): 2.5, (2, 2, 2): 1.5, (1, 1): 0.0}
    for shape, links in sides.items():
        chips = [SimpleNamespace(coords=place) for place in np.ndindex(shape)]
        assert mean_hops(chips) == links
        found = overlap(Program.parse(text), lambda i: 0.0, 1.0, hops=links)
        assert found.total == found.exposed == 96 * links + 96


ESTIMATES = {"f.2": 60, "other": 25, "operand": 5}


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")  # the cache's programs for a TPU cannot be read without
@jax.default_matmul_precision("default")
def test_a_compiled_program_that_multiplies_while_it_sends():
    pytest.importorskip("libtpu", reason="the compiler for TPUs: pip install 'phi3-jax[tpu]'")
    mesh = Mesh(np.array(devices_of("v5e:2x2")).reshape(4), "x")
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def run(a, b, w):
        return jax.lax.ppermute(a, "x", ring), b @ w

    spec, size = PartitionSpec("x"), 2048
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=(spec, spec)
    )
    shapes = [((4 * size, size), spec), ((4 * size, size), spec), ((size, size), PartitionSpec())]
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes
    ]
    compiled = Program.parse(jax.jit(mapped).lower(*args).compile().as_text())
    assert collective_bytes(compiled) == {"collective-permute": size * size * 2}
    found = profile(compiled, [], CHIPS["v5e"], 1.0, 1)
    assert found.overlap.hidden == 1  # 42 microseconds for the one, 87 for the other
