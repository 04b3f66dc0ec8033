"""Paths through a kernel's machine code: the one where it spends its time."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.machine_code.opcodes import base, is_philox
from benchmarks.machine_code.reader import Function, Instruction, parse
from benchmarks.machine_code.tools import ToolError

# Ten rounds of two, less those that a compiler takes out of a loop.
PHILOX_PRODUCTS = 16


def innermost_loop(sass: str) -> list[str]:
    """Opcodes of the shortest backward branch's body that holds 64-bit multiplications, which is Philox's.

    Raises:
        ToolError: there is no such loop.
    """
    bodies = [
        [instruction.opcode for instruction in function.instructions[first : last + 1]]
        for function in parse(sass)
        for first, last in function.loops
    ]
    loops = [body for body in bodies if any(is_philox(opcode) for opcode in body)]
    if not loops:
        raise ToolError("expected a loop with 64-bit multiplications in the machine code, got none")
    return min(loops, key=len)


def num_made(path: list[Instruction], makes: re.Pattern[str]) -> int:
    """How many opcodes of a path match."""
    return sum(bool(makes.match(instruction.opcode)) for instruction in path)


def path_that_makes_most(
    function: Function, first: int, last: int | None, makes: re.Pattern[str]
) -> list[Instruction]:
    """The path forward from first to last (None: to any exit) with the most opcodes that match makes, and of
    those the shortest: side ways for ragged ends and skipped terms are not on it."""
    best: dict[int, tuple[int, int, int | None]] = {}  # number that match, minus length, next
    instructions = function.instructions
    end = len(instructions) - 1 if last is None else last
    for at in range(end, first - 1, -1):
        own = int(bool(makes.match(instructions[at].opcode)))
        is_end = at == last if last is not None else base(instructions[at].opcode) == "EXIT"
        choices: list[tuple[int, int, int | None]] = [(own, -1, None)] if is_end else []
        for then in function.following(at) if at != last else ():
            if then > at and then in best:
                made, minus_length, _ = best[then]
                choices.append((own + made, minus_length - 1, then))
        if choices:
            best[at] = max(choices, key=lambda choice: choice[:2])
    path: list[Instruction] = []
    at_now = first if first in best else None
    while at_now is not None:
        path.append(instructions[at_now])
        at_now = best[at_now][2]
    return path


@dataclass(frozen=True)
class HotPath:
    """Where a kernel spends its time: instructions, how many make an element, whether it is a loop."""

    instructions: list[Instruction]
    num_made: int
    is_loop: bool

    @property
    def opcodes(self) -> list[str]:
        return [instruction.opcode for instruction in self.instructions]

    @property
    def has_calls(self) -> bool:
        """Whether subroutines are called on it, which come back; a CALL with targets does not."""
        return any(base(i.opcode) == "CALL" and not i.targets for i in self.instructions)


def hot_path(function: Function, makes: re.Pattern[str]) -> HotPath:
    """The innermost loop that makes the most; without one, the way from entry to exit that does.

    Loops without calls come first: the subroutines of 64-bit divisions belong to addresses.

    Args:
        makes: the opcode that is there once for each element.
    Raises:
        ToolError: the function has no such opcode.
    """

    def path(first: int, last: int | None) -> HotPath:
        found = path_that_makes_most(function, first, last, makes)
        return HotPath(found, num_made(found, makes), last is not None)

    loops = [loop for loop in (path(*loop) for loop in function.innermost_loops()) if loop.num_made]
    if loops:
        return max(loops, key=lambda loop: (not loop.has_calls, loop.num_made))
    straight = path(0, None)
    if not straight.num_made:
        raise ToolError(f"expected {makes.pattern} in the machine code of {function.name}, got none")
    return straight


def nested_loops(function: Function, makes: re.Pattern[str]) -> list[list[str]]:
    """The way through the innermost loop that makes the most, and through each loop around it but for what is
    in the one before: opcodes, from the inside outwards; [] if no loop makes any.

    A way through an outer loop is the one with the most Philox products, which has every part of the work.
    """
    found = [(path_that_makes_most(function, *loop, makes), loop) for loop in function.innermost_loops()]
    inner, loop = max(found, key=lambda item: num_made(item[0], makes), default=([], (0, 0)))
    if not num_made(inner, makes):
        return []
    works = re.compile(rf"{makes.pattern}|IMAD\.WIDE")
    paths = [inner, *(path_that_makes_most(function, *outer, works) for outer in function.loops_around(loop))]
    ways = [[instruction.opcode for instruction in path] for path in paths]
    return [ways[0], *(list((Counter(way) - Counter(within)).elements()) for within, way in pairwise(ways))]
