"""GPU machine code (SASS) read from text: functions, instructions, and where control goes after each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from benchmarks.machine_code.opcodes import CONTROL, Flow, base, classify
from benchmarks.machine_code.tools import ToolError, disassembly, find_binary_tool, run


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    text: opcode and operands, without the predicate that may guard it.
    goes_on: whether control may go to the next instruction.
    targets: positions of the function's instructions that it may jump to.
    conditions: predicates and the values that all of them have where it jumps or ends the function.
    """

    opcode: str
    text: str
    goes_on: bool
    targets: tuple[int, ...] = ()
    conditions: tuple[tuple[str, bool], ...] = ()


@dataclass
class Function:
    """One kernel as it is disassembled."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def following(self, at: int) -> Iterator[int]:
        """Where control may go after an instruction."""
        instruction = self.instructions[at]
        if instruction.goes_on:
            yield at + 1
        yield from instruction.targets

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """(first, last) instruction of each backward jump that a way forward from its target comes to.

        Others come back from a side way that stands behind the function's end.
        """
        return [
            (first, at)
            for at, instruction in enumerate(self.instructions)
            for first in instruction.targets
            if first <= at and self._goes_forward(first, at)
        ]

    def _goes_forward(self, first: int, last: int) -> bool:
        reached = {first}
        for at in range(first, last):
            if at in reached:
                reached.update(then for then in self.following(at) if then > at)
        return last in reached

    def innermost_loops(self) -> list[tuple[int, int]]:
        """The loops that hold no other; a jump to itself (the padding of a function's end) is none."""
        loops = [loop for loop in self.loops if loop[0] < loop[1]]
        return [
            (first, last)
            for first, last in loops
            if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        ]

    def loops_around(self, loop: tuple[int, int]) -> list[tuple[int, int]]:
        """The loops that hold one, from the inside outwards."""
        first, last = loop
        return sorted((a, b) for a, b in self.loops if a <= first and last <= b and (a, b) != loop)[::-1]


_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"\s*(\.L\w+):")
_ADDRESS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s")
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*\S*?)(\s.*)?;")


def parse(sass: str) -> list[Function]:
    """The functions of nvdisasm's output (-c); text without a section is one function without a name.

    Raises:
        ToolError: an instruction that opcodes.py does not know, or a jump whose targets are not known.
    """
    sections: list[tuple[str, list[str]]] = [("", [])]
    for line in sass.splitlines():
        if section := _SECTION.match(line):
            sections.append((section.group(1), []))
        else:
            sections[-1][1].append(line)
    functions = (_function(name, lines) for name, lines in sections)
    return [function for function in functions if function.instructions]


def _function(name: str, lines: list[str]) -> Function:
    found: list[tuple[str, str, str]] = []  # guard, opcode, operands
    labels: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(found)
        elif instruction := _LINE.match(line):
            guard, opcode, operands = instruction.groups(default="")
            found.append((guard, opcode, operands.strip()))
        elif _ADDRESS.match(line):
            raise ToolError(f"expected an instruction in {name}, got {line.strip()!r}")
    return Function(name, [_instruction(name, *parts, labels) for parts in found])


def _instruction(
    function: str, guard: str, opcode: str, operands: str, labels: dict[str, int]
) -> Instruction:
    classify(opcode)
    text = f"{opcode} {operands}".strip()
    flow = CONTROL.get(base(opcode), Flow.ON)
    named = re.findall(r"\.L\w+", operands)
    if flow is Flow.CALL:  # CALL of a label never returns: sm_80 leaves loops so
        flow = Flow.JUMP if named else Flow.ON
    if flow is Flow.ON:
        return Instruction(opcode, text, goes_on=True)
    # A branch may have a condition as an operand: BRA P1, `(.L); BRA.U !UP0, `(.L).
    parts = [guard.strip(" @")]
    if base(opcode) == "BRA":
        parts.append(operands.partition("`")[0].strip(" ,"))
    conditions = tuple((part.strip("!"), "!" not in part) for part in parts if part)
    if flow is Flow.END:
        return Instruction(opcode, text, bool(conditions), (), conditions)
    if not named or not labels.keys() >= set(named):
        raise ToolError(f"expected labels of {function} that a jump may go to, got {text}")
    return Instruction(opcode, text, bool(conditions), tuple(labels[label] for label in named), conditions)


@dataclass(frozen=True)
class Usage:
    """What a kernel takes for a thread: registers, bytes of stack; and local memory instructions (spills)."""

    registers: int
    stack: int
    spills: int


def read_cubin(cubin: Path) -> list[tuple[Function, Usage]]:
    """Disassemble a file of machine code.

    Raises:
        ToolError: a tool is missing or fails, or the machine code is not as expected.
    """
    functions = parse(disassembly(cubin))
    usage = run([find_binary_tool("cuobjdump"), "--dump-resource-usage", str(cubin)])
    found = dict(re.findall(r"Function (\S+):\s*\n?\s*(REG:.*)", usage))
    results = []
    for function in functions:
        if function.name in found:
            numbers = dict(re.findall(r"(\w+):(\d+)", found[function.name]))
            spills = sum(base(i.opcode) in ("STL", "LDL") for i in function.instructions)
            results.append((function, Usage(int(numbers["REG"]), int(numbers["STACK"]), spills)))
    return results


def readable_name(mangled: str) -> str:
    """A template kernel's C++ name from its mangled one: few_terms<Bf16, Gaussian, 1>; else what is given."""
    head = re.match(r"_Z(\d+)", mangled)
    if head is None:
        return mangled
    start, length = head.end(), int(head.group(1))
    name, rest = mangled[start : start + length], mangled[start + length :]
    if not rest.startswith("I"):
        return name
    arguments, at = [], 1
    while at < len(rest) and rest[at] != "E":
        if number := re.match(r"L[a-z](\d+)E", rest[at:]):
            arguments.append(number.group(1))
            at += number.end()
        elif word := re.match(r"\d+", rest[at:]):
            begin = at + word.end()
            at = begin + int(word.group())
            arguments.append(rest[begin:at])
        else:
            return mangled
    return f"{name}<{', '.join(arguments)}>"
