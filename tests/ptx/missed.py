"""Basic blocks that never ran: of which line of the sources each is, and why no call comes there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ptx.cuda_build import readable_name
from ptx.parser import Source, parse, sources_of

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:,.*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?.*$", re.M)
_MARK = "loc"

#: A pattern of the lines of a place, innermost first, and why blocks there do not run.
REASONS = (
    (r"^[^<]*\bdiv\.s64", "a division of 64 bits, for more than 2^32 runs of a tensor"),
    (
        r"rows && d == 0|rows\[i\]|ld\.global\.u64.*setp\.ge\.s64.*find_slot",
        "dimension 0 is the last of the loop: one of four copies of its body meets it",
    ),
    (
        r"(residual_out|Storage::split|memory\.begin|write_octet|write_element|write_whole|\(Element|uint4).*"
        r"minus, bits\)|memory\.whole = tile\.memory\.whole",
        "a copy of the code that writes a side: the minus side is never split into weights and residuals",
    ),
    (r"tensor\.residual|Storage::value", "tensors of this kernel always have residuals, or never"),
    (r"Storage::widen.*add_weights.*(acc, bits|minus, bits)", "weights of this kernel always have residuals"),
)


class Place(NamedTuple):
    """Blocks of one line: how many, the line and where it was inlined, the reason if there is one."""

    num_blocks: int
    lines: str
    reason: str


def missed_places(folder: Path, missed: Mapping[str, Collection[int]]) -> dict[str, list[Place]]:
    """The places of blocks by kernel, from the PTX in a folder of `cuda_build.build`."""
    found = {}
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        files = {number: Path(name) for number, name in _FILE.findall(text)}
        for symbol, source in sources_of(_LINE.sub(_marked, text)).items():
            name = readable_name(symbol)
            if name in missed:
                found[name] = _places(source, files, missed[name])
    return found


def _marked(line: re.Match[str]) -> str:
    """An instruction in the place of a directive, which would be dropped."""
    return f"{_MARK} {' '.join(group for group in line.groups() if group)};"


def _places(source: Source, files: dict[str, Path], missed: Collection[int]) -> list[Place]:
    counted: Counter[str] = Counter()
    texts: dict[str, list[str]] = {}
    for index, (instruction, chain) in enumerate(_starts(source)):
        if index in missed:
            lines = " < ".join(f"{files[file].name}:{line}" for file, line, _ in chain)
            counted[lines] += 1
            code = [_text(files[file], int(line)) for file, line, _ in chain]
            texts.setdefault(lines, []).append(" < ".join([instruction, *code]))
    return [Place(count, lines, _reason(texts[lines])) for lines, count in counted.most_common()]


def _starts(source: Source) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """For each block its instructions, and the line of the first with those where it was inlined."""
    known: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    current: list[tuple[str, ...]] = []
    for block in parse(source).blocks:
        texts, first = [], None
        for statement in block.statements:
            if statement.opcode == _MARK:
                numbers = tuple(statement.text.split()[1:])
                own, outer = numbers[:3], numbers[3:]
                current = known[own] = [own, *(known.get(outer, [outer]) if outer else [])]
            else:
                texts.append(statement.text)
                first = first or current
        if texts or block.end.kind != "next":
            yield "; ".join(texts), first or current


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _text(path: Path, line: int) -> str:
    lines = _lines(path)
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def _reason(texts: list[str]) -> str:
    """The one reason of all blocks of a place."""
    reasons = {next((why for pattern, why in REASONS if re.search(pattern, text)), "") for text in texts}
    return reasons.pop() if len(reasons) == 1 else ""
