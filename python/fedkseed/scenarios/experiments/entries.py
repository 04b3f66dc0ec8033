"""Parts of a run's summary, each asked for with its type: what a damaged file has is refused in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fedkseed.documents import shown


class ComparisonError(ValueError):
    """Runs that cannot be compared, or a folder without a finished run."""


class Entry:
    """A value of a file with its place in it, asked for parts that have to be of a type.

    Args:
        value: an object, if parts are asked for.
        path: of the file, for messages.
        place: names of the objects around it, with points between them.

    Raises:
        ComparisonError: a part that is asked for is missing or of another type; names it.
    """

    def __init__(self, value: Any, path: Path, place: str = "") -> None:
        self._value, self._path, self._place = value, path, place

    def error(self, expected: str, name: str = "") -> ComparisonError:
        """An error that says what was expected of a part, and what is there."""
        place = ".".join(part for part in (self._place, name) if part) or "the whole"
        return ComparisonError(
            f"expected {expected} at {place} of {self._path}, got {shown(self._got(name))}; the file is "
            "damaged or of another version: run it anew"
        )

    def _got(self, name: str) -> Any:
        if not name:
            return self._value
        return self._value.get(name, "nothing") if isinstance(self._value, dict) else self._value

    def __contains__(self, name: str) -> bool:
        return isinstance(self._value, dict) and self._value.get(name) is not None

    def __getitem__(self, name: str) -> Entry:
        found = self._value.get(name) if isinstance(self._value, dict) else None
        if not isinstance(found, dict):
            raise self.error("an object", name)
        return Entry(found, self._path, f"{self._place}.{name}" if self._place else name)

    def items(self) -> dict[str, Any]:
        """All of an object, values that are texts, numbers, truth values or null."""
        for name, value in self._value.items():
            if not (value is None or isinstance(value, (str, bool, int, float))):
                raise self.error("a text, a number, true, false or null", name)
        return dict(self._value)

    def text(self, name: str) -> str:
        """A text."""
        found = self._got(name)
        if name not in self or not isinstance(found, str):
            raise self.error("a text", name)
        return found

    def count(self, name: str) -> int:
        """A number from 0 on."""
        found = self._got(name)
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 2**63:
            raise self.error("a count", name)
        return found

    def number(self, name: str) -> float:
        """A number."""
        found = self._got(name)
        if not _is_number(found):
            raise self.error("a number", name)
        return float(found)

    def pair(self, name: str) -> tuple[float | None, float | None]:
        """A score before and after; None of one that is not finite."""
        found = self._got(name)
        is_pair = isinstance(found, list) and len(found) == 2
        if not is_pair or not all(value is None or _is_number(value) for value in found):
            raise self.error("a list of two numbers", name)
        before, after = found
        return before, after

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of so many numbers."""
        found = self._got(name)
        if not isinstance(found, list) or len(found) != length or not all(map(_is_number, found)):
            raise self.error(f"a list of {length} numbers", name)
        return tuple(map(float, found))

    def rows_of_numbers(self, name: str, height: int, length: int) -> list[tuple[float, ...]]:
        """A list of so many lists of so many numbers."""
        found = self._got(name)
        if not isinstance(found, list) or len(found) != height:
            raise self.error(f"a list of {height} lists of {length} numbers", name)
        named = {f"{name}[{index}]": row for index, row in enumerate(found)}
        rows = Entry(named, self._path, self._place)
        return [rows.numbers(key, length) for key in named]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
