"""Read a compiled program's text (HLO): its instructions, and how often each of them runs.

XLA has no public interface to a compiled program's instructions; its text is stable enough to read
line by line. Only what a plan needs is kept.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

# Layouts also contain parentheses, but after capital letters: `bf16[8,128]{1,0:T(8,128)}`.
_OPERATION = re.compile(r"(?<![\w\-])([a-z][a-z\-]*[a-z])\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%?[\w.\-]+ = .*)$")
_LABEL = re.compile(r"%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `label = result opcode(operands), attributes`.

    Attributes:
        label: its name within the program.
        opcode: such as `fusion` or `all-gather-start`.
        result: type and layout of the result, as text.
        rest: operands and attributes, as text.
    """

    label: str
    opcode: str
    result: str
    rest: str

    @property
    def name(self) -> str:
        """The JAX operation it comes from with its scopes; empty if the compiler added it."""
        found = _NAME.search(self.rest)
        return found[1] if found else ""

    @property
    def operands(self) -> str:
        """The operands without the attributes, as text."""
        return self.rest.split("), ")[0]

    @property
    def operand_labels(self) -> list[str]:
        """The instructions whose results it takes, by label."""
        return _OPERAND.findall(self.operands)

    @property
    def called(self) -> list[str]:
        """Names of the computations it calls, without a loop's condition."""
        branches = [
            name.strip().lstrip("%")
            for listed in _BRANCHES.findall(self.rest)
            for name in listed.split(",")
        ]
        return _CALLED.findall(self.rest) + branches


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled program by name, and the one that runs."""

    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read the text of `compiled.as_text()`; text without a computation is an empty program."""
        computations: dict[str, list[Instruction]] = {"": []}
        entry = current = ""
        pending: list[str] = []

        def finish() -> None:
            text = "\n".join(pending)
            if (label := _LABEL.match(text)) and (found := _OPERATION.search(text, label.end())):
                result, rest = text[label.end() : found.start()], text[found.end() :]
                computations[current].append(Instruction(label[1], found[1], result, rest))
            pending.clear()

        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                finish()
                current = header[2]
                computations[current] = []
                entry = current if header[1] else entry
            elif start := _INSTRUCTION.match(line):
                finish()
                pending.append(start[1])
            elif line == "}":
                finish()
                current = ""
            elif pending:  # an attribute that spans lines, such as a kernel's metadata
                pending.append(line)
        finish()
        return cls(computations, entry)

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """The operations of a fusion, those of inner fusions included."""
        if instruction.opcode != "fusion":
            return []
        found = []
        for name in instruction.called:
            for inner in self.computations.get(name, []):
                found += [inner, *self.inside(inner)]
        return found

    def run(self, while_trips: int = 1) -> Iterator[tuple[Instruction, int, str]]:
        """Every instruction that runs, how often, and its computation; a fusion counts as one.

        Args:
            while_trips: iterations of loops whose trip count the text does not have.
        """
        yield from self._run(self.entry, 1, while_trips)

    def _run(self, name: str, times: int, trips: int) -> Iterator[tuple[Instruction, int, str]]:
        for instruction in self.computations.get(name, []):
            yield instruction, times, name
            if instruction.opcode == "while":
                inner = times * self.loop_trips(instruction, trips)
            elif instruction.opcode in ("call", "conditional", "async-start"):
                inner = times
            else:
                continue
            for called in instruction.called:
                yield from self._run(called, inner, trips)

    def loop_trips(self, loop: Instruction, unknown: int) -> int:
        """How often a `while` runs its body."""
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        # A loop with a fixed trip count has it in its condition; a dynamic one does not.
        condition = _CONDITION.findall(loop.rest)
        limits = [
            int(value)
            for instruction in self.computations.get(condition[0] if condition else "", [])
            if instruction.opcode == "constant" and instruction.result.startswith("s32[]")
            if (value := instruction.rest.partition(")")[0]).isdigit()
        ]
        return max(limits, default=unknown)
