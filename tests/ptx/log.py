"""The log of all cases: what ran, what came out, and which basic blocks did run; kept as text.

A record holds while its key does: a hash of the emulator, of the host code that launches, of the case and of
the texts of the kernels that it launched. So it holds for any architecture whose kernels have the same text.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ptx.missed import Place


class Record(NamedTuple):
    """How one case ended. covered_by: the part in which it ran, where kernels of the same text did."""

    verdict: str
    key: str
    seconds: float = 0.0
    instructions: int = 0
    kernels: tuple[str, ...] = ()
    detail: str = ""
    covered_by: str = ""


@dataclass
class Coverage:
    """Basic blocks of one text of a kernel: how many there are, which never ran, what a look at it noted."""

    blocks: int
    missed: set[int]
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return 1 - len(self.missed) / self.blocks if self.blocks else 1.0


def as_ranges(numbers: Iterable[int]) -> str:
    """3-5,9 of 3, 4, 5, 9."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: str) -> set[int]:
    """3, 4, 5, 9 of 3-5,9."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


class Log:
    """Records by part and case, digests of each part's kernels; coverage and what it lacks by digest."""

    def __init__(self, path: Path, emulator: str):
        self._path, self._emulator = path, emulator
        self.records: dict[str, dict[str, Record]] = {}
        self.kernels: dict[str, dict[str, str]] = {}
        self.coverage: dict[str, Coverage] = {}
        self.places: dict[str, list[Place]] = {}
        if path.exists():
            self._read(json.loads(path.read_text()))

    def _read(self, data: dict[str, Any]) -> None:
        if data["emulator"] != self._emulator:
            return
        kernels = data["kernels"]
        for part, rows in data["cases"].items():
            names = list(kernels[part])
            self.records[part] = {case: self._record(row, names) for case, row in rows.items()}
            self.kernels[part] = kernels[part]
        for digest, (blocks, missed, notes) in data["coverage"].items():
            self.coverage[digest] = Coverage(blocks, from_ranges(missed), notes)
        for digest, places in data["missed"].items():
            self.places[digest] = [Place(*place) for place in places]

    @staticmethod
    def _record(row: list[Any], names: list[str]) -> Record:
        verdict, key, seconds, instructions, kernels, detail, covered_by = row
        launched = tuple(names[i] for i in kernels)
        return Record(verdict, key, seconds, instructions, launched, detail, covered_by)

    @staticmethod
    def _row(record: Record, numbers: dict[str, int]) -> list[Any]:
        """A record as a list, with kernels by their numbers."""
        return [*record[:4], [numbers[name] for name in record.kernels], record.detail, record.covered_by]

    def _launched(self, part: str) -> dict[str, str]:
        """The kernels of a part's records, with their digests."""
        names = {name for record in self.records[part].values() for name in record.kernels}
        return {name: digest for name, digest in self.kernels.get(part, {}).items() if name in names}

    def add(self, part: str, case: str, record: Record) -> None:
        self.records.setdefault(part, {})[case] = record

    def add_coverage(self, part: str, name: str, digest: str, found: Coverage) -> None:
        """Blocks that never ran in a case, of a kernel that did."""
        self.kernels.setdefault(part, {})[name] = digest
        if (known := self.coverage.get(digest)) is not None:
            found.missed &= known.missed
        self.coverage[digest] = found

    def keep(self, part: str, cases: Iterable[str]) -> None:
        """Drop the records of cases that are no more."""
        known = self.records.get(part, {})
        self.records[part] = {case: known[case] for case in cases if case in known}

    def counts(self, part: str) -> Counter[str]:
        return Counter(record.verdict for record in self.records.get(part, {}).values())

    def table(self, part: str) -> dict[str, Any]:
        """One part in numbers."""
        records = list(self.records.get(part, {}).values())
        ran = [record for record in records if not record.covered_by]
        return {
            "cases": len(records),
            **self.counts(part),
            "ran here": len(ran),
            "seconds": round(sum(record.seconds for record in ran)),
            "instructions of threads": sum(record.instructions for record in ran),
            "kernels": len(self.kernels.get(part, {})),
            "smallest share of blocks": round(
                min((self.coverage[d].share for d in self.kernels.get(part, {}).values()), default=1.0), 3
            ),
        }

    def save(self) -> None:
        """Write the file in one rename: each case and each kernel is a line."""

        def line(key: str, value: Any) -> str:
            return f"  {json.dumps(key)}: {json.dumps(value)}"

        def lines(rows: dict[str, Any]) -> str:
            return "{\n" + ",\n".join(line(key, value) for key, value in rows.items()) + "\n }"

        kernels = {part: self._launched(part) for part in self.records}
        numbers = {part: {name: i for i, name in enumerate(names)} for part, names in kernels.items()}
        used = {digest for names in kernels.values() for digest in names.values()}
        coverage = {
            digest: [c.blocks, as_ranges(c.missed), c.notes]
            for digest, c in sorted(self.coverage.items())
            if digest in used
        }
        cases = {
            part: {case: self._row(record, numbers[part]) for case, record in records.items()}
            for part, records in self.records.items()
        }
        inner = ",\n ".join(f"{json.dumps(part)}: {lines(rows)}" for part, rows in cases.items())
        text = (
            '{\n "command": "make ptx",\n'
            f' "emulator": {json.dumps(self._emulator)},\n'
            f' "parts": {lines({part: self.table(part) for part in self.records})},\n'
            f' "kernels": {lines(kernels)},\n'
            f' "coverage": {lines(coverage)},\n'
            f' "missed": {lines({d: places for d, places in sorted(self.places.items()) if d in used})},\n'
            f' "cases": {{\n {inner}\n }}\n}}\n'
        )
        part_file = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        part_file.write_text(text)
        part_file.replace(self._path)
