"""What a part's process hands to the run: lines of JSON in a file, each whole, as soon as there is something.

A row replaces an earlier one of the same key. Notes are fields of the part, facts those of the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, REFUSED = "passed", "failed", "skipped", "refused"
OVER_TIME, NOT_BEGUN, RUNNING, STOPPED = "over time", "not begun", "running", "stopped"


class PartEnded(Exception):  # noqa: N818  not always an error
    """The end of a part before its last line, with the status and the reason that the document gets."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason


class Channel:
    """The writing end, in the part's process.

    Args:
        path: of the lines; other processes of the part may append to them too.
        seconds: the part's time; the run ends its process soon after.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self._end = time.monotonic() + seconds

    def row(self, row: dict[str, Any], *, key: str | None = None, text: str | None = None) -> None:
        """Hands over a result; its text goes to the log, and the run prints it too."""
        if text:
            print(text, flush=True)
        append(self.path, {"row": row} | ({"key": key} if key else {}) | ({"text": text} if text else {}))

    def say(self, text: str) -> None:
        """Hands over a line for the log that the run prints too."""
        print(text, flush=True)
        append(self.path, {"text": text})

    def note(self, **fields: Any) -> None:
        """Sets fields of the part."""
        append(self.path, {"note": fields})

    def facts(self, **fields: Any) -> None:
        """Sets fields of the environment."""
        append(self.path, {"facts": fields})

    def check_time(self) -> None:
        """Raises once the part's time is over: what is called between two measurements.

        Raises:
            PartEnded: it is.
        """
        if time.monotonic() > self._end:
            raise PartEnded(OVER_TIME, "its time was over between two measurements; the rows so far stand")

    def noted(self, field: str) -> Any:
        """The last value of a field, whichever process of the part noted it; None if none did."""
        values = [
            line["note"][field] for line in LineReader(self.path).new() if field in line.get("note", ())
        ]
        return values[-1] if values else None


class LineReader:
    """The reading end: complete lines that were appended since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def new(self) -> list[dict[str, Any]]:
        """What is new; a line that is still being written comes with the next call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        lines = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # of a process that was killed while it wrote
                lines.append(json.loads(line))
        return lines


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends a line in one write, so that several processes can."""
    data = (json.dumps(line) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
