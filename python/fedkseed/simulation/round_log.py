"""The lines that a run writes about its rounds, one JSON object a round, and their readers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedkseed.documents import MAX_LINE_BYTES, DocumentError, json_lines, shown
from fedkseed.simulation.run_folder import RunFolderError

#: An object of lists: no row is nested more deeply.
_MAX_DEPTH = 2
#: Names of a row of metrics that list clients.
LISTS = ("clients", "failed")
_COUNTS = ("bytes_down", "bytes_up", "num_skipped")
_METRICS = {"round", *LISTS, "train_loss", "evaluation", *_COUNTS}


def check_metrics(row: Mapping[str, Any]) -> None:
    """Raises unless the row has the names and types of a round's metrics.

    Raises:
        ValueError: says in which name.
    """
    if row.keys() != _METRICS:
        raise ValueError(f"the names {', '.join(sorted(_METRICS))} are not all, or not all there are")
    for name in LISTS:
        if not isinstance(row[name], list) or not all(_is_count(entry) for entry in row[name]):
            raise ValueError(f"{name} is not a list of numbers of clients")
    for name in _COUNTS:
        if not _is_count(row[name]):
            raise ValueError(f"{name} is not a count")
    found = row["evaluation"]
    if not isinstance(found, dict) or not all(
        value is None or _is_number(value) for value in (row["train_loss"], *found.values())
    ):
        raise ValueError("train_loss, or a value of evaluation, is neither a number nor null")


def check_timings(row: Mapping[str, Any]) -> None:
    """Raises unless the row has seconds by name.

    Raises:
        ValueError: says in which name.
    """
    for name, value in row.items():
        if not _is_number(value):
            raise ValueError(f"{shown(name)} is not a number of seconds")


def read_rounds(
    path: Path,
    check: Callable[[Mapping[str, Any]], None] = check_metrics,
    *,
    num_rounds: int | None = None,
    max_bytes: int | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of rounds 0, 1, ... of a file, one at a time.

    Args:
        path: of the file.
        check: raises ValueError for a row that is none.
        num_rounds: how many; the lines after them are not looked at. None: all.
        max_bytes: the bound of all lines; None: none, a row at a time needs little memory.

    Raises:
        RunFolderError: fewer lines, or one that is not the row of its round.
    """
    for row, _ in _rows(path, check, num_rounds, max_bytes):
        yield row


class RoundLog:
    """A file of one JSON object a line, one line a round from round 0 on, that grows by whole lines.

    Args:
        path: of the file.
        num_rounds: rounds that are complete: further lines, of a round that was cut off, do not count.
        check: raises ValueError for a row that is none.

    Raises:
        RunFolderError: fewer lines, or lines that are not those of rounds 0, 1, ...
    """

    def __init__(self, path: Path, num_rounds: int, check: Callable[[Mapping[str, Any]], None]) -> None:
        self._path, self._check = path, check
        self._num_rounds = num_rounds
        self._end = 0
        for _, self._end in _rows(path, check, num_rounds, None):
            pass

    @property
    def rows(self) -> Iterator[dict[str, Any]]:
        """The objects, read anew one at a time.

        Raises:
            RunFolderError: somebody has changed the file.
        """
        return read_rounds(self._path, self._check, num_rounds=self._num_rounds)

    def cut(self) -> None:
        """Removes the lines that do not count.

        Raises:
            OSError: it cannot be written.
        """
        if self._path.exists():
            with open(self._path, "r+b") as file:
                file.truncate(self._end)
                os.fsync(file.fileno())

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one round. After a crash at any instant the lines before it are there, and maybe a part of it.

        Raises:
            ValueError: a row that could not be read again.
            OSError: the lines before it stay as they were.
        """
        line = (json.dumps(dict(row), sort_keys=True, allow_nan=False) + "\n").encode()
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"expected at most {MAX_LINE_BYTES:,} bytes of a round in {self._path}, got more"
            )
        with open(self._path, "r+b" if self._end else "wb", buffering=0) as file:
            file.truncate(self._end)
            file.seek(self._end)
            try:
                if self._end and not _ends_a_line(file, self._end):
                    line = b"\n" + line
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(self._end)
                raise
        self._end += len(line)
        self._num_rounds += 1


def _rows(
    path: Path,
    check: Callable[[Mapping[str, Any]], None],
    num_rounds: int | None,
    max_bytes: int | None,
) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, end of its line in the file) of each round."""
    number = 0
    if num_rounds == 0:
        return
    try:
        with open(path, "rb") as file:
            for line, row in json_lines(file, path.name, max_bytes=max_bytes, max_depth=_MAX_DEPTH):
                _check_row(row, number, check, line)
                yield row, file.tell()
                number += 1
                if number == num_rounds:
                    return
    except (OSError, DocumentError) as error:
        raise RunFolderError(f"expected a line a round in {path}, got: {error}") from error
    if num_rounds is not None:
        raise RunFolderError(f"expected a line a round in {path}, {num_rounds} in all, got {number}")


def _check_row(row: Any, number: int, check: Callable[[Mapping[str, Any]], None], line: int) -> None:
    try:
        if not isinstance(row, dict):
            raise ValueError("not an object")
        if not _is_count(row.get("round")) or row["round"] != number:
            raise ValueError(f"round {shown(row.get('round'))}")
        check(row)
    except ValueError as error:
        raise DocumentError(f"line {line} is not the row of round {number}: {error}") from error


def _ends_a_line(file: Any, end: int) -> bool:
    last: bytes = os.pread(file.fileno(), 1, end - 1)
    return last == b"\n"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
