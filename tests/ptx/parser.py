"""PTX as text, read into kernels: parameters, registers, shared memory, and basic blocks of statements."""

from __future__ import annotations

import hashlib
import re
from collections import ChainMap, Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

#: Bits of each type; a predicate is a bool.
SIZES = {
    "pred": 1,
    **{f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)},
    **{"bf16": 16, "f16x2": 32, "bf16x2": 32, "f32x2": 64},
}
_ENTRY = re.compile(
    r"\.entry\s+([\w$]+)\s*\((.*?)\)((?:\s*\.(?:maxntid|reqntid|minnctapersm|maxnreg)[^{\n]*)*)\s*\{", re.S
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.global\s+)?(?:\.align\s+\d+\s+)?"
    r"([\w$]+)(?:\[(\d+)\])?"
)
_DYNAMIC = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]")
_VARIABLE = re.compile(r"^\s*(?:\.visible\s+)?\.(?:global|const)\s+[^\n]*", re.M)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]")
# A label, the begin or end of a scope, or a statement (whose vectors stand in braces).
_PIECE = re.compile(r'\s*(?:([$\w]+):|([{}])|([^;{}"]*(?:"[^"]*"[^;{}"]*|\{[^{};]*\}[^;{}"]*)*);)')
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?$", re.S)
_OPERAND = re.compile(r"[^,{\[]*(?:\{[^}]*\}|\[[^\]]*\])?[^,{\[]*")
# Shared memory of a launch is aligned to this.
SHARED_ALIGNMENT = 128


class FaultError(Exception):
    """The kernel did what hardware punishes, or what no order of threads makes well defined."""


class UnknownPtxError(Exception):
    """PTX that this emulator does not know."""


class Register(NamedTuple):
    """A place in the list of registers, and its bits."""

    place: int
    bits: int


class Statement(NamedTuple):
    """One instruction. guard: its predicate, and whether that is negated; names: registers in scope."""

    guard: tuple[int, bool] | None
    opcode: str
    operands: list[str]
    names: Mapping[str, Register]
    text: str


class Parameter(NamedTuple):
    name: str
    offset: int
    num_bytes: int


class End(NamedTuple):
    """How a basic block ends, on which predicate, and where a branch goes.

    kind: next, branch, return or barrier.
    """

    kind: str
    guard: tuple[int, bool] | None = None
    target: int = -1


class Block(NamedTuple):
    """A basic block: statements up to a branch, a barrier or the next label. length: instructions in all."""

    statements: list[Statement]
    end: End
    length: int


@dataclass
class Entry:
    """A kernel as its text says it."""

    name: str
    parameters: list[Parameter]
    param_bytes: int
    max_threads: int
    symbols: dict[str, int]  # offsets of parameters and of variables in shared memory
    shared_bytes: int
    register_bits: list[int]
    blocks: list[Block]
    opcodes: Counter[str] = field(default_factory=Counter)


class Source(NamedTuple):
    """The text of a kernel, apart from its module: `parse` reads it."""

    name: str
    parameters: str
    hints: str
    body: str
    dynamic: str | None  # name of the shared memory whose size the launch says

    @property
    def digest(self) -> str:
        """A hash of all that decides what the kernel does; comments and the target are no part of it."""
        text = "\n".join(map(str, self))
        return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:10]


def sources_of(text: str) -> dict[str, Source]:
    """The kernels of a PTX module by name.

    Raises:
        UnknownPtxError: the module has variables of its own.
    """
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", text), flags=re.S)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
    if variables := _VARIABLE.findall(text):
        raise UnknownPtxError(f"module variables {variables}")
    dynamic = _DYNAMIC.search(text)
    found = {}
    for match in _ENTRY.finditer(text):
        depth, end = 1, match.end()
        for brace in re.compile("[{}]").finditer(text, match.end()):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                end = brace.start()
                break
        name, parameters, hints = match.groups()
        found[name] = Source(name, parameters, hints, text[match.end() : end], dynamic and dynamic[1])
    return found


def operands_of(text: str) -> list[str]:
    """Parts between commas outside of brackets and braces."""
    parts = [part.strip() for part in _OPERAND.findall(text)]
    return [part for part in parts if part]


def _aligned(at: int, to: int) -> int:
    return -(-at // to) * to


class _Parser:
    def __init__(self, source: Source):
        self.code: list[Statement] = []
        self.labels: dict[str, int] = {}
        self.register_bits: list[int] = []
        self.symbols: dict[str, int] = {}
        self.shared_bytes = 0
        self.parameters: list[Parameter] = []
        at = 0
        for align, kind, name, count in _PARAMETER.findall(source.parameters):
            size = SIZES[kind] // 8
            at = _aligned(at, int(align or size))
            self.parameters.append(Parameter(name, at, size * int(count or 1)))
            self.symbols[name] = at
            at += size * int(count or 1)
        self.param_bytes = at
        self._read_body(source.body)
        if source.dynamic:
            self.shared_bytes = _aligned(self.shared_bytes, SHARED_ALIGNMENT)
            self.symbols[source.dynamic] = self.shared_bytes

    def _read_body(self, body: str) -> None:
        scopes: list[dict[str, Register]] = [{}]
        names: Mapping[str, Register] = scopes[0]
        at = 0
        while piece := _PIECE.match(body, at):
            at = piece.end()
            label, brace, text = piece.groups()
            if label:
                self.labels[label] = len(self.code)
            elif brace:
                if brace == "{":
                    scopes.append({})
                else:
                    scopes.pop()
                names = scopes[0] if len(scopes) == 1 else ChainMap(*reversed(scopes))
            else:
                self._read_statement(" ".join(text.split()), scopes[-1], names)
        if body[at:].strip():
            raise UnknownPtxError(body[at : at + 80])

    def _read_statement(self, text: str, scope: dict[str, Register], names: Mapping[str, Register]) -> None:
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            self._declare(text, scope)
            return
        if shared := _SHARED.match(text):
            self.shared_bytes = _aligned(self.shared_bytes, int(shared[1]))
            self.symbols[shared[2]] = self.shared_bytes
            self.shared_bytes += int(shared[3])
            return
        match = _STATEMENT.match(text)
        if match is None:
            raise UnknownPtxError(text)
        negated, predicate, opcode, operands = match.groups()
        guard = (names[predicate].place, negated == "!") if predicate else None
        self.code.append(Statement(guard, opcode, operands_of(operands or ""), names, text))

    def _declare(self, text: str, scope: dict[str, Register]) -> None:
        _, kind, names = text.split(maxsplit=2)
        bits = SIZES[kind[1:]]
        for name in operands_of(names):
            if many := re.match(r"(%\w+)<(\d+)>", name):
                declared = [f"{many[1]}{i}" for i in range(int(many[2]))]
            else:
                declared = [name]
            for register in declared:
                scope[register] = Register(len(self.register_bits), bits)
                self.register_bits.append(bits)

    def blocks(self) -> list[Block]:
        starts = {0, *self.labels.values()}
        starts |= {i + 1 for i, statement in enumerate(self.code) if _ends_block(statement)}
        order = sorted(start for start in starts if start < len(self.code))
        index = {start: b for b, start in enumerate(order)}
        index[len(self.code)] = len(order)
        return [
            self._block(start, stop, index)
            for start, stop in zip(order, [*order[1:], len(self.code)], strict=True)
        ]

    def _block(self, start: int, stop: int, index: dict[int, int]) -> Block:
        statements, end = self.code[start:stop], End("next")
        if statements and _ends_block(last := statements[-1]):
            statements = statements[:-1]
            kind = last.opcode.partition(".")[0]
            if kind == "bra":
                end = End("branch", last.guard, index[self.labels[last.operands[0]]])
            elif kind in ("ret", "exit"):
                end = End("return", last.guard)
            elif last.guard or last.operands != ["0"] or last.opcode not in ("bar.sync", "barrier.sync"):
                raise UnknownPtxError(last.text)
            else:
                end = End("barrier")
        return Block(statements, end, stop - start)


def _ends_block(statement: Statement) -> bool:
    return statement.opcode.partition(".")[0] in ("bra", "ret", "exit", "bar", "barrier")


def parse(source: Source) -> Entry:
    """The kernel that a source describes.

    Raises:
        UnknownPtxError: something of it is not known.
    """
    read = _Parser(source)
    limit = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", source.hints)
    return Entry(
        source.name,
        read.parameters,
        read.param_bytes,
        int(limit[1]) if limit else 1024,
        read.symbols,
        read.shared_bytes,
        read.register_bits,
        read.blocks(),
        Counter(statement.opcode for statement in read.code),
    )
