"""GPU machine code (SASS) read from files: functions, instructions, loops, and the path that matters."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import util
from itertools import pairwise
from pathlib import Path


class ToolError(RuntimeError):
    """A compiler or tool is missing or fails, or machine code is not as expected; the message says which."""


def find_binary_tool(name: str) -> str:
    """A tool of the CUDA toolkit that reads machine code: on PATH, else the copy inside the triton package.

    Raises:
        ToolError: there is none.
    """
    spec = util.find_spec("triton")
    folders = [str(Path(spec.origin).parent / "backends/nvidia/bin")] if spec and spec.origin else []
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise ToolError(
            f"expected {name} on PATH or in the triton package, got none; "
            "run: pip install 'fedkseed-kernels[bench]'"
        )
    return found


def run(command: Sequence[str], folder: Path | None = None) -> str:
    """Standard output of a command, run in a folder.

    Raises:
        ToolError: it failed.
    """
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if result.returncode:
        output = result.stderr or result.stdout
        raise ToolError(f"{Path(command[0]).name} failed ({result.returncode}):\n{output}")
    return result.stdout


@dataclass(frozen=True)
class Instruction:
    """Opcode with its modifiers, whether a predicate guards it, and the label that a branch goes to."""

    opcode: str
    is_guarded: bool
    target: str | None


@dataclass
class Function:
    """One kernel as it is disassembled; labels give positions in instructions."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) instruction of each backward branch that a way forward from its target comes to.

        Others come back from a side way that stands behind the function's end.
        """
        found = []
        for at, instruction in enumerate(self.instructions):
            first = self.labels.get(instruction.target or "", at + 1)
            if first <= at and path_that_makes_most(self, first, at, _NOTHING):
                found.append((first, at))
        return found

    def innermost_loops(self) -> list[tuple[int, int]]:
        """The loops that hold no other; a branch to itself (the padding of a function's end) is none."""
        loops = [loop for loop in self.loops() if loop[0] < loop[1]]
        return [
            (first, last)
            for first, last in loops
            if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        ]

    def loops_around(self, loop: tuple[int, int]) -> list[tuple[int, int]]:
        """The loops that hold one, from the inside outwards."""
        first, last = loop
        return sorted((a, b) for a, b in self.loops() if a <= first and last <= b and (a, b) != loop)[::-1]


_NOTHING = re.compile("$")
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)(.*);")


def parse(sass: str) -> list[Function]:
    """The functions of nvdisasm's output (-c); text without a section is one function without a name."""
    functions = [Function("")]
    for line in sass.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            functions.append(Function(section.group(1)))
        elif label := re.match(r"\s*(\.L\w+):", line):
            functions[-1].labels[label.group(1)] = len(functions[-1].instructions)
        elif found := _LINE.match(line):
            guard, opcode, operands = found.groups()
            target = re.search(r"\.L\w+", operands) if opcode.startswith("BRA") else None
            is_guarded = bool(guard) or _has_condition(opcode, operands)
            functions[-1].instructions.append(Instruction(opcode, is_guarded, target and target.group()))
    return [function for function in functions if function.instructions]


def _has_condition(opcode: str, operands: str) -> bool:
    """Branches may carry their condition as an operand: BRA P1, `(.L); BRA.DIV UR4, `(.L)."""
    return opcode.startswith("BRA") and bool(re.match(r"\s*(!?U?P\w+\s*,|UR|R)", operands))


def innermost_loop(sass: str) -> list[str]:
    """Opcodes of the shortest backward branch's body that holds 64-bit multiplications, which is Philox's.

    Raises:
        ToolError: there is no such loop.
    """
    bodies = [
        [instruction.opcode for instruction in function.instructions[first : last + 1]]
        for function in parse(sass)
        for first, last in function.loops()
    ]
    loops = [body for body in bodies if any(is_philox(opcode) for opcode in body)]
    if not loops:
        raise ToolError("expected a loop with 64-bit multiplications in the machine code, got none")
    return min(loops, key=len)


# Ten rounds of two, less those that a compiler takes out of a loop.
PHILOX_PRODUCTS = 16


def is_philox(opcode: str) -> bool:
    """A 64-bit product of 32-bit words, which Philox is made of."""
    return opcode.startswith("IMAD.WIDE")


def path_that_makes_most(
    function: Function, first: int, last: int | None, makes: re.Pattern[str]
) -> list[str]:
    """Opcodes of the path forward from first to last (None: to any exit) with the most that
    match makes, and of those the shortest: side ways for ragged ends and skipped terms are not on it."""
    best: dict[int, tuple[int, int, int | None]] = {}  # number that match, minus length, next
    instructions = function.instructions
    end = len(instructions) - 1 if last is None else last
    for at in range(end, first - 1, -1):
        instruction = instructions[at]
        own = int(bool(makes.match(instruction.opcode)))
        is_end = at == last if last is not None else instruction.opcode.startswith("EXIT")
        choices: list[tuple[int, int, int | None]] = [(own, -1, None)] if is_end else []
        following: list[int] = []
        jumps = instruction.opcode.startswith(("BRA", "EXIT", "RET"))
        if not jumps or instruction.is_guarded:
            following.append(at + 1)
        if instruction.target is not None and not is_end:
            following.append(function.labels.get(instruction.target, -1))
        for then in following:
            if then > at and then in best:
                made, minus_length, _ = best[then]
                choices.append((own + made, minus_length - 1, then))
        if choices:
            best[at] = max(choices, key=lambda choice: choice[:2])
    path: list[str] = []
    at_now = first if first in best else None
    while at_now is not None:
        path.append(instructions[at_now].opcode)
        at_now = best[at_now][2]
    return path


@dataclass(frozen=True)
class HotPath:
    """Where a kernel spends its time: opcodes, how many of them make an element, whether it is a loop."""

    opcodes: list[str]
    num_made: int
    is_loop: bool


def hot_path(function: Function, makes: re.Pattern[str]) -> HotPath:
    """The innermost loop that makes the most; without one, the way from entry to exit that does.

    Loops without calls come first: the subroutines of 64-bit divisions belong to addresses.

    Args:
        makes: the opcode that is there once for each element.
    Raises:
        ToolError: the function has no such opcode.
    """
    paths = [(path_that_makes_most(function, *loop, makes), True) for loop in function.innermost_loops()]
    paths.append((path_that_makes_most(function, 0, None, makes), False))
    found = [HotPath(path, sum(bool(makes.match(o)) for o in path), is_loop) for path, is_loop in paths]
    loops = [path for path in found if path.is_loop and path.num_made]
    if loops:
        return max(
            loops, key=lambda path: (not any(o.startswith("CALL") for o in path.opcodes), path.num_made)
        )
    if not found[-1].num_made:
        raise ToolError(f"expected {makes.pattern} in the machine code of {function.name}, got none")
    return found[-1]


def nested_loops(function: Function, makes: re.Pattern[str]) -> list[list[str]]:
    """The way through the innermost loop that makes the most, and through each loop around it but for what is
    in the one before: opcodes, from the inside outwards; [] if no loop makes any.

    A way through an outer loop is the one with the most Philox products, which has every part of the work.
    """
    found = [(path_that_makes_most(function, *loop, makes), loop) for loop in function.innermost_loops()]
    inner, loop = max(found, key=lambda item: sum(map(bool, map(makes.match, item[0]))), default=([], (0, 0)))
    if not any(map(makes.match, inner)):
        return []
    works = re.compile(rf"{makes.pattern}|IMAD\.WIDE")
    ways = [inner, *(path_that_makes_most(function, *outer, works) for outer in function.loops_around(loop))]
    return [inner, *(list((Counter(way) - Counter(within)).elements()) for within, way in pairwise(ways))]


#: Kinds of instructions, by the beginnings of their opcodes; the first that fits counts.
CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("move", ("HFMA2.MMA", "MOV", "CS2R", "S2R", "P2R", "R2P", "PLOP3", "SHFL", "VOTE")),
    ("conversion", ("I2F", "F2F", "F2I", "HADD2.F32")),
    ("FMA", ("FFMA", "DFMA", "HFMA2")),
    ("matrix", ("IMMA",)),
    (
        "other float",
        ("FADD", "FMUL", "FSEL", "FSET", "FMNMX", "FCHK", "MUFU", "DADD", "DMUL", "DSET", "HADD2"),
    ),
    ("memory", ("LD", "ST", "ATOM", "RED", "CCTL", "MEMBAR", "UBLKCP")),
    ("uniform", ("U", "R2UR", "S2UR", "REDUX")),
    ("control", ("BRA", "EXIT", "BAR", "BSSY", "BSYNC", "BREAK", "RET", "CALL", "NOP", "WARPSYNC", "DEPBAR")),
    (
        "integer",
        ("I", "LOP", "SHF", "PRMT", "LEA", "SEL", "VI", "POPC", "FLO", "BMSK", "SGXT", "BREV", "VABS"),
    ),
)


def classify(opcode: str) -> str:
    """The kind of an instruction, a name of CLASSES; "other" if it is none of them."""
    for name, beginnings in CLASSES:
        if opcode.startswith(beginnings):
            return name
    return "other"


@dataclass(frozen=True)
class Usage:
    """What a kernel takes for a thread: registers, bytes of stack; and local memory instructions (spills)."""

    registers: int
    stack: int
    spills: int


def read_cubin(cubin: Path) -> list[tuple[Function, Usage]]:
    """Disassemble a file of machine code.

    Raises:
        ToolError: a tool is missing or fails.
    """
    functions = parse(run([find_binary_tool("nvdisasm"), "-c", str(cubin)]))
    usage = run([find_binary_tool("cuobjdump"), "--dump-resource-usage", str(cubin)])
    found = dict(re.findall(r"Function (\S+):\s*\n?\s*(REG:.*)", usage))
    results = []
    for function in functions:
        if function.name in found:
            numbers = dict(re.findall(r"(\w+):(\d+)", found[function.name]))
            spills = sum(i.opcode.startswith(("STL", "LDL")) for i in function.instructions)
            results.append((function, Usage(int(numbers["REG"]), int(numbers["STACK"]), spills)))
    return results


def extract_cubins(library: Path, folder: Path) -> dict[str, list[Path]]:
    """The machine code inside a library, written to a folder: files by architecture (sm_90).

    Raises:
        ToolError: a tool is missing or fails.
    """
    run([find_binary_tool("cuobjdump"), "--extract-elf", "all", str(library.resolve())], folder)
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.cubin")):
        if arch := re.search(r"\.(sm_\d+)[a-z]?\.cubin$", file.name):
            found.setdefault(arch.group(1), []).append(file)
    return found


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
