"""What the compiled steps of a mesh exchange between devices, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from phi3_jax.generation import generate as generation
from phi3_jax.planning.collectives import COLLECTIVES, collective_bytes
from phi3_jax.planning.hlo import Instruction, Program
from phi3_jax.sharding.mesh import batch_sharding, place
from phi3_jax.training import loop
from phi3_jax.training.loop import train
from tests.phi3_jax.training.test_mesh_run import on

pytestmark = pytest.mark.usefixtures("compiled_anew")


@pytest.fixture(scope="module")
def run(checkpoint, chats, tmp_path_factory):
    """A run over `fsdp` before its first step."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "evaluate", lambda run: None)
        patch.setattr(loop, "take_steps", lambda run: found.append(run) or exit())
        with pytest.raises(SystemExit):
            train(on((1, 8, 1), checkpoint, chats, tmp_path_factory.mktemp("run")))
    with jax.set_mesh(found[0].mesh):
        yield found[0]


@pytest.fixture(scope="module", params=["train", "eval"])
def program(request, run) -> Program:
    if request.param == "train":
        arguments = run.state, run.frozen, run.fetch().placed, np.int32(0), np.uint32(0)
        lowered = run.train_step.lower(*arguments)
    else:
        batch = next(iter(run.plan.eval_batches(run.held_out)))
        placed = place(batch, batch_sharding(run.mesh))
        lowered = run.eval_step.lower(run.weights(), run.frozen, placed)
    return Program.parse(lowered.compile().as_text())


def size(state) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_each_device_computes_its_own_rows(run, program):
    """It gathers weights and adds up the adapter's gradients, and exchanges nothing of a row but
    its token ids and embeddings."""
    moved = collective_bytes(program)
    passes = 3  # forward, and in training recomputed and backward
    assert moved["all-gather"] < passes * (size(run.frozen) + size(run.state.trainable))
    assert moved["all-reduce"] <= 2 * size(run.state.trainable)
    rows, length = run.fetch().placed["tokens"].shape[-2:]
    assert moved["all-to-all"] <= rows * length * run.setup.checkpoint.config.hidden_size * 4
    assert set(moved) == {"all-gather", "all-reduce", "all-to-all"}


def test_no_collective_can_overtake_a_loop(program):
    """XLA's CPU runtime starts a collective once a loop before it has started, unless it needs the
    loop's result: the two then exchange in any order, and processes receive each other's wrong
    message."""
    assert list(overtaking(program)) == []


def test_generation_gathers_no_weights(run, monkeypatch):
    """A few tokens per step, as many rows as devices: each keeps its part of the weights."""
    moved = []

    def compiled(graphdef, *arguments):
        program = generate_jitted.lower(graphdef, *arguments).compile()
        moved.append(collective_bytes(Program.parse(program.as_text())))
        return program(*arguments)

    generate_jitted = generation._generate
    monkeypatch.setattr(generation, "_generate", compiled)
    generation.generate(run.model(), [[1, 2, 3]] * 8, max_new_tokens=2)
    assert moved and "all-gather" not in moved[0]


def overtaking(program: Program) -> Iterator[tuple[str, str]]:
    """Loops with collectives, and what exchanges after them without waiting for them."""

    def exchanges(instruction: Instruction) -> bool:
        inner = [i for name in instruction.called for i in program.computations.get(name, [])]
        return instruction.opcode in COLLECTIVES or any(map(exchanges, inner))

    for instructions in program.computations.values():
        needs: dict[str, set[str]] = {}
        loops: list[str] = []
        for instruction in instructions:
            operands = instruction.operand_labels
            needs[instruction.label] = set(operands).union(*(needs.get(o, ()) for o in operands))
            if exchanges(instruction):
                for earlier in loops:
                    if earlier not in needs[instruction.label]:
                        yield earlier, instruction.label
                if instruction.opcode not in COLLECTIVES:
                    loops.append(instruction.label)


def test_overtaking_is_noticed():
    """As it was when each device evaluated every row: a mask gathered beside the layers' loop."""
    text = """
%body (b: f32[8]) -> f32[8] {
  %gathered.1 = f32[16]{0} all-gather(%b), channel_id=1, dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %before = f32[16]{0} all-gather(%a), channel_id=2, dimensions={0}
  %layers = f32[8]{0} while(%before), condition=%lost, body=%body
  %mask = pred[8]{0} compare(%a, %a), direction=GT
  %gathered.2 = pred[16]{0} all-gather(%mask), channel_id=3, dimensions={0}
  %half = f32[8]{0} multiply(%layers, %layers)
  %sum = f32[8]{0} all-reduce(%half), channel_id=4, to_apply=%add
}
"""
    assert list(overtaking(Program.parse(text))) == [("layers", "gathered.2")]
