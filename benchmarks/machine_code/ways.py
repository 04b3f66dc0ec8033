"""Ways through a loop that serves several cases at run time: a way is named by what it goes past."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import add, gt, lt

from benchmarks.machine_code.opcodes import CONTROL, base
from benchmarks.machine_code.reader import Function, Instruction
from benchmarks.machine_code.tools import ToolError

#: Values of predicates that a way relies on.
Needs = frozenset[tuple[str, bool]]
_PREDICATE = re.compile(r"U?P\d")


@dataclass(frozen=True)
class Landmark:
    """What a way passes: so many instructions whose text matches."""

    what: str
    pattern: re.Pattern[str]
    least: int
    most: int


@dataclass(frozen=True)
class _Rest:
    """The shortest rest of a way: its length, the next position (-1 after the last), and the state there."""

    length: int
    then: int
    state: tuple[tuple[int, ...], Needs]


def _steps(function: Function, at: int) -> Iterator[tuple[int, Needs]]:
    """Where control may go after an instruction, and the values of predicates with which it does."""
    instruction = function.instructions[at]
    for then in instruction.targets:
        yield then, frozenset(instruction.conditions)
    if instruction.goes_on and not instruction.conditions:
        yield at + 1, frozenset()
    # Past a jump: the first condition fails, or it holds and the second fails.
    for i, (predicate, value) in enumerate(instruction.conditions):
        yield at + 1, frozenset({*instruction.conditions[:i], (predicate, not value)})


def _written(instruction: Instruction) -> frozenset[str]:
    """The predicates that an instruction may write: those among its first operands."""
    if base(instruction.opcode) in CONTROL:
        return frozenset()
    if base(instruction.opcode) == "R2P":
        return frozenset(f"P{i}" for i in range(7))
    operands = instruction.text.removeprefix(instruction.opcode).split(",")[:3]
    return frozenset(filter(_PREDICATE.fullmatch, map(str.strip, operands)))


def way_past(function: Function, first: int, last: int, landmarks: tuple[Landmark, ...]) -> list[Instruction]:
    """The shortest path forward from first to last that passes exactly the landmarks; [] if there is none.

    No predicate is true for one jump and false for a later one unless it may have been written between.
    """
    instructions = function.instructions[first : last + 1]
    owns = [tuple(int(bool(mark.pattern.match(i.text))) for mark in landmarks) for i in instructions]
    least, most = [mark.least for mark in landmarks], [mark.most for mark in landmarks]
    if any(map(lt, map(sum, zip(*owns, strict=True)), least)):
        return []
    # By position: what is passed from there to last and which predicates that needs, and the shortest way to.
    rests: dict[int, dict[tuple[tuple[int, ...], Needs], _Rest]] = {}
    rests[last] = {(owns[-1], frozenset()): _Rest(1, -1, ((), frozenset()))}
    for at in range(last - 1, first - 1, -1):
        own = owns[at - first]
        written = _written(function.instructions[at])
        found = rests[at] = {}
        for then, taken in _steps(function, at):
            for state, rest in rests[then].items() if at < then <= last else ():
                passed = tuple(map(add, own, state[0]))
                if any(map(gt, passed, most)):
                    continue
                needs = taken.union(need for need in state[1] if need[0] not in written)
                if len({predicate for predicate, _ in needs}) < len(needs):
                    continue
                if (passed, needs) not in found or rest.length + 1 < found[passed, needs].length:
                    found[passed, needs] = _Rest(rest.length + 1, then, state)
    complete = [
        (rest.length, state) for state, rest in rests[first].items() if not any(map(lt, state[0], least))
    ]
    if not complete:
        return []
    _, state = min(complete, key=lambda item: item[0])
    way, at = [], first
    while at >= 0:
        way.append(function.instructions[at])
        at, state = (rest := rests[at][state]).then, rest.state
    return way


def loop_past(function: Function, landmarks: tuple[Landmark, ...]) -> list[Instruction]:
    """The way through a loop that passes exactly the landmarks, the shortest of any loop.

    Raises:
        ToolError: no loop has such a way.
    """
    found = [way for loop in function.loops if (way := way_past(function, *loop, landmarks))]
    if not found:
        wanted = ", ".join(f"{mark.least} to {mark.most} {mark.what}" for mark in landmarks)
        raise ToolError(
            f"expected a way through a loop of {function.name} past {wanted}, got none; read its disassembly "
            "and correct the landmarks in benchmarks/machine_code/few_terms.py"
        )
    return min(found, key=len)
