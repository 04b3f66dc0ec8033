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

    def covering(self, part: str) -> Record:
        """The record of the same case in another part, where this one's part covers it."""
        return self._replace(seconds=0.0, instructions=0, detail="", covered_by=part)


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
    """Records by part and case, digests of each part's kernels; coverage and what it lacks by digest.

    In the file a case is a line, with an entry for each part: "verdict key seconds instructions kernels
    detail", "= part" where that part covers it, or nothing.
    """

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
        self.kernels, reasons = data["kernels"], data["reasons"]
        names = {part: list(kernels) for part, kernels in self.kernels.items()}
        self.records = {part: {} for part in data["parts"]}
        for case, entries in data["cases"].items():
            found: dict[str, Record] = {}
            for part, entry in zip(data["parts"], entries, strict=True):
                if entry and not entry.startswith("= "):
                    found[part] = self._record(entry, names[part])
            for part, entry in zip(data["parts"], entries, strict=True):
                if entry.startswith("= "):
                    found[part] = found[entry[2:]].covering(entry[2:])
                if part in found:
                    self.records[part][case] = found[part]
        for digest, (blocks, missed, notes) in data["coverage"].items():
            self.coverage[digest] = Coverage(blocks, from_ranges(missed), notes)
        for digest, places in data["missed"].items():
            self.places[digest] = [Place(count, lines, reasons[reason]) for count, lines, reason in places]

    @staticmethod
    def _record(entry: str, names: list[str]) -> Record:
        verdict, key, seconds, instructions, kernels, *detail = entry.split(" ", 5)
        launched = tuple(names[int(i)] for i in kernels.split(",") if i != "-")
        return Record(verdict, key, float(seconds), int(instructions), launched, "".join(detail))

    def _entry(self, part: str, case: str, numbers: dict[str, int]) -> str:
        record = self.records[part].get(case)
        if record is None:
            return ""
        if record.covered_by:
            other = self.records.get(record.covered_by, {}).get(case)
            # What it rests on may have run anew since: then it is looked at again the next time.
            return f"= {record.covered_by}" if other is not None and other.key == record.key else ""
        kernels = ",".join(str(numbers[name]) for name in record.kernels) or "-"
        words = record.verdict, record.key, record.seconds, record.instructions, kernels, record.detail
        return " ".join(map(str, words)).rstrip()

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
        records = self.records.get(part, {}).values()
        ran = [record for record in records if not record.covered_by]
        shares = [self.coverage[digest].share for digest in self._launched(part).values()]
        return {
            "cases": len(records),
            **self.counts(part),
            "ran here": len(ran),
            "seconds": round(sum(record.seconds for record in ran)),
            "instructions of threads": sum(record.instructions for record in ran),
            "kernels": len(shares),
            "smallest share of blocks": round(min(shares, default=1.0), 3),
        }

    def save(self) -> None:
        """Write the file in one rename."""
        parts = list(self.records)
        kernels = {part: self._launched(part) for part in parts}
        numbers = {part: {name: i for i, name in enumerate(names)} for part, names in kernels.items()}
        used = {digest for names in kernels.values() for digest in names.values()}
        coverage = {
            digest: [c.blocks, as_ranges(c.missed), c.notes]
            for digest, c in sorted(self.coverage.items())
            if digest in used
        }
        reasons = sorted({place.reason for places in self.places.values() for place in places})
        missed = {
            digest: [[place.num_blocks, place.lines, reasons.index(place.reason)] for place in places]
            for digest, places in sorted(self.places.items())
            if digest in used
        }
        names = dict.fromkeys(case for records in self.records.values() for case in records)
        cases = {case: [self._entry(part, case, numbers[part]) for part in parts] for case in names}
        sections = {
            "parts": _lines({part: self.table(part) for part in parts}),
            "kernels": _lines(kernels),
            "coverage": _lines(coverage),
            "reasons": json.dumps(reasons),
            "missed": _lines(missed),
            "cases": _lines(cases),
        }
        inner = ",\n".join(f' "{name}": {text}' for name, text in sections.items())
        text = f'{{\n "command": "make ptx",\n "emulator": {json.dumps(self._emulator)},\n{inner}\n}}\n'
        part_file = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        part_file.write_text(text)
        part_file.replace(self._path)


def _lines(rows: dict[str, Any]) -> str:
    """A JSON object with a line for each item."""
    inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())
    return f"{{\n{inner}\n }}" if rows else "{}"
