"""The collectives of a compiled program: their bytes, and how much of their time other work hides.

A program for a TPU starts most collectives early, works, and then waits for them. In its text that
is a pair of instructions such as `all-gather-start` and `all-gather-done`, or fusions: the first of
them starts the collective, the last one waits for it, and those between carry it along beside work
of their own. Instructions stand in the order in which they run.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Literal

from phi3_jax.planning.hlo import Instruction, Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\})")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TARGET = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')


@dataclasses.dataclass(frozen=True)
class Event:
    """A collective that starts, ends, or does both at once (`whole`).

    Attributes:
        kind: one of `COLLECTIVES`.
        key: the same for start and end.
        bytes: what a chip receives or sends, the larger side; 0 at an end.
    """

    role: Literal["start", "end", "whole"]
    kind: str
    key: str
    bytes: int = 0


def events(program: Program, instruction: Instruction, computation: str) -> list[Event]:
    """The collectives that an instruction of a computation starts or ends."""
    if kind := _kind(instruction.opcode):
        if instruction.opcode.endswith("-done"):
            return [Event("end", kind, next(iter(instruction.operand_labels), ""))]
        role: Literal["start", "whole"] = "whole"
        if instruction.opcode.endswith("-start"):
            role = "start"
        size = _moved(program, instruction, computation)
        return [Event(role, kind, instruction.label, size)]
    inside = program.inside(instruction)
    targets = {target[1] for inner in inside if (target := _TARGET.search(inner.rest))}
    found: list[Event] = []
    for inner in inside if targets else []:
        if (kind := _kind(inner.opcode)) and (channel := _CHANNEL.search(inner.rest)):
            if "Start" in targets:
                found.append(Event("start", kind, channel[1], _bytes(inner.result)))
            if "Done" in targets:
                found.append(Event("end", kind, channel[1]))
    return found


def collective_bytes(program: Program, while_trips: int = 1) -> dict[str, int]:
    """Bytes each chip receives or sends per run, by kind of collective: the larger operand side.

    Args:
        program: a compiled program, for one chip.
        while_trips: iterations of loops whose trip count is not in the text.
    """
    total: collections.Counter[str] = collections.Counter()
    for instruction, times, computation in program.run(while_trips):
        if instruction.opcode == "while":
            for body in filter(_is_ring, instruction.called):
                total["collective-permute"] += times * _ring_bytes(program.computations[body])
        if not _is_ring(computation):
            for event in events(program, instruction, computation):
                total[event.kind] += times * event.bytes
    return {kind: size for kind, size in total.items() if size}


@dataclasses.dataclass
class Overlap:
    """Cycles of a program's collectives at the full rate of the interconnect, one after another.

    Attributes:
        total: of all collectives.
        exposed: of these, those during which the chip only waits.
    """

    total: float = 0.0
    exposed: float = 0.0

    @property
    def hidden(self) -> float:
        """Share of the time of the collectives during which other work runs."""
        return 1 - self.exposed / self.total if self.total else 1.0


def overlap(
    program: Program,
    cycles_of: Callable[[Instruction], float],
    cycles_per_byte: float,
    while_trips: int = 1,
    hops: float = 1.0,
) -> Overlap:
    """How much of the time of the collectives the work scheduled beside them takes.

    A collective proceeds while instructions between its start and its end run; what is left of it
    at its end, the chip waits for. Those that are under way at once take turns, in the order in
    which they started.

    Args:
        program: a compiled program, for one chip.
        cycles_of: cycles of an instruction's own work.
        cycles_per_byte: of the interconnect.
        while_trips: iterations of loops whose trip count is not in the text.
        hops: links that a byte of an all-to-all crosses on average; the other collectives pass
            theirs from neighbor to neighbor.
    """
    found = Overlap()

    def run(name: str, times: int) -> float:
        """Go through a computation and return the cycles of its work."""
        left: dict[str, float] = {}  # cycles of the collectives under way
        worked = 0.0
        for instruction in program.computations.get(name, []):
            for event in events(program, instruction, name):
                crossed = hops if event.kind == "all-to-all" else 1.0
                cycles = event.bytes * cycles_per_byte * crossed
                found.total += times * cycles
                if event.role == "whole":
                    found.exposed += times * cycles
                elif event.role == "start":
                    left[event.key] = cycles
                else:
                    found.exposed += times * _wait(left, event.key)
            cycles = cycles_of(instruction)
            trips = program.loop_trips(instruction, while_trips)
            for called, count in _calls(instruction, trips):
                cycles += count * run(called, times * count)
            _proceed(left, cycles)
            worked += cycles
        found.exposed += times * sum(left.values())
        return worked

    run(program.entry, 1)
    return found


def _calls(instruction: Instruction, trips: int) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, and how often."""
    if instruction.opcode in ("while", "call", "conditional", "async-start"):
        for name in instruction.called:
            yield name, trips if instruction.opcode == "while" else 1


def _proceed(left: dict[str, float], cycles: float) -> None:
    """Let the collectives under way proceed for that many cycles."""
    for key in list(left):
        step = min(cycles, left[key])
        left[key] -= step
        cycles -= step


def _wait(left: dict[str, float], key: str) -> float:
    """Cycles until that collective has ended, with those before it."""
    waited = 0.0
    for earlier in list(left) if key in left else []:
        waited += left.pop(earlier)
        left[earlier] = 0.0
        if earlier == key:
            del left[key]
            break
    return waited


def _kind(opcode: str) -> str:
    """The kind of a collective's instruction; empty for other instructions."""
    kind = opcode.removesuffix("-start").removesuffix("-done")
    return kind if kind in COLLECTIVES else ""


def _moved(program: Program, instruction: Instruction, computation: str) -> int:
    """The larger side of a collective, its operands or its result."""
    labels = set(instruction.operand_labels)
    sizes = [_bytes(instruction.result), _bytes(instruction.operands)]
    sizes += [_bytes(i.result) for i in program.computations[computation] if i.label in labels]
    return max(sizes)


def _is_ring(computation: str) -> bool:
    """Whether this is the body of a matmul that passes one operand around as it computes."""
    return "windowed_dot_general" in computation


def _ring_bytes(body: list[Instruction]) -> int:
    """Each chip receives g - 1 of g shards, however the compiler unrolled the loop."""
    sizes = [0]
    for instruction in body:
        is_collective = instruction.opcode.removesuffix("-start") in COLLECTIVES
        if is_collective and (pairs := _PAIRS.search(instruction.rest)):
            shards = pairs[1].count("{") - 2  # minus its own; one bracket encloses them all
            sizes.append(shards * _bytes(instruction.result))
    return max(sizes)


def _bytes(text: str) -> int:
    """Bytes of the largest array in a piece of HLO; for a tuple, its largest member."""
    sizes = [
        _BYTES.get(kind, 4) * math.prod(int(size) for size in dims.split(",") if size)
        for kind, dims in _SHAPE.findall(text)
    ]
    return max(sizes, default=0)
