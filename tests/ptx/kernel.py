"""A kernel that can run: each basic block becomes a Python function when it first runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import arithmetic
from ptx.instructions import Constants, Instruction
from ptx.parser import Source, Statement, parse

_NUMBER = re.compile(r"\d+")
_SHARED_ACCESS = re.compile(r"(?:ld|st|atom)\.shared\.(?:\w+\.)*?[busf](8|16|32|64)$")

#: Shapes of statements that were found to be known, with what was to note about them.
_known: dict[tuple[bool, str, str], Counter[str]] = {}

Function = Callable[[list[Any], Any, Any], None]


class Kernel:
    """A source with functions of its blocks; `covered[b]` says whether block b ran."""

    def __init__(self, source: Source):
        self.source = source
        self.entry = parse(source)
        self.notes: Counter[str] = Counter()
        self.covered = bytearray(len(self.entry.blocks))
        self._functions: list[list[Function | None]] = [[None, None] for _ in self.entry.blocks]
        self._space: dict[str, Any] = {**vars(arithmetic), "np": np}
        self._constants = Constants(self._space)
        sizes = {4}
        for block in self.entry.blocks:
            for statement in block.statements:
                self.notes += self._look_at(statement)
                if access := _SHARED_ACCESS.match(statement.opcode):
                    sizes.add(int(access[1]) // 8)
        #: The smallest access of shared memory: races are looked for between such parts of it.
        self.shared_granule = min(sizes)

    @property
    def name(self) -> str:
        return self.source.name

    def _look_at(self, statement: Statement) -> Counter[str]:
        """Raise for a statement that is not known, whether or not it ever runs."""
        operands = ",".join(statement.operands)
        shape = (statement.guard is not None, statement.opcode, _NUMBER.sub("", operands))
        if shape not in _known:
            notes: Counter[str] = Counter()
            Instruction(statement, self.entry.symbols, Constants({}), True, notes)
            _known[shape] = notes
        return _known[shape]

    def function(self, index: int, is_masked: bool) -> Function:
        """The code of a block, for all lanes or for those of a mask."""
        made = self._functions[index][is_masked]
        if made is None:
            lines = [
                line
                for statement in self.entry.blocks[index].statements
                for line in Instruction(statement, self.entry.symbols, self._constants, is_masked).lines
            ]
            text = "def block(R, M, S):\n  " + "\n  ".join(lines or ["pass"])
            exec(compile(text, f"{self.name}, block {index}", "exec"), self._space)
            made = self._functions[index][is_masked] = self._space.pop("block")
        return made
