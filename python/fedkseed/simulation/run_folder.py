"""The folder of a run: the server's state, the ledger, the metrics of each round and what they took.

    server.state        the server's, see `federation.state`
    clients.json        what the clients compute with; a resumed run must have the same
    ledger.safetensors  the model after the last round that is complete
    metrics.jsonl       one line a round; the same bytes in every run of the same configuration
    timings.jsonl       one line a round; seconds, which differ

The clients' settings are written once, and again if the first round shows that "auto" has to be another
storage mode. All others are written anew and renamed after each round, the server's state last: after a crash
at any instant the state says which lines of the others count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkseed.federation.state import StateError
from fedkseed.files import read_bounded, write_atomically
from fedkseed.storage import StorageOptions, mode_of_text

METRICS, TIMINGS, LEDGER = "metrics.jsonl", "timings.jsonl", "ledger.safetensors"
CLIENTS = "clients.json"
_MAX_BYTES = 1 << 30


class RunFolderError(ValueError):
    """A folder that does not hold what a run left there."""


def check_client_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises unless the run in the folder has these settings, or was begun before they were kept.

    Args:
        path: of the file.
        settings: by name; what `write_client_settings` takes.

    Raises:
        StateError: the run has another value; says in which setting, and names both.
        RunFolderError: the file cannot be read, or is not one of settings.
    """
    if not path.exists():
        return
    found = _settings_in(path)
    if found.keys() != settings.keys():
        raise RunFolderError(f"expected {', '.join(settings)} in {path}, got {found}")
    for name, value in settings.items():
        if found[name] != value:
            raise StateError(
                f"expected clients with {name} {found[name]}, which the run in {path.parent} began with, "
                f"got {value}; resume with the configuration that it began with"
            )


def kept_storage(path: Path) -> StorageOptions | None:
    """The storage mode among the clients' settings; None in a folder from before they were kept.

    Args:
        path: of the file.

    Raises:
        RunFolderError: the file cannot be read, or holds no mode.
    """
    if not path.exists():
        return None
    settings = _settings_in(path)
    try:
        return mode_of_text(settings.get("storage"))
    except ValueError as error:
        raise RunFolderError(f"expected a storage mode in {path}, got {error}") from error


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bounded(path, _MAX_BYTES))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"expected the settings of the clients in {path}, got {error}") from error
    if not isinstance(found, dict):
        raise RunFolderError(f"expected the settings of the clients in {path}, got {found}")
    return found


def write_client_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Keeps what `check_client_settings` compares.

    Raises:
        OSError: the file stays as it was.
    """
    write_atomically(path, (json.dumps(dict(settings), indent=2) + "\n").encode())


class RoundLog:
    """A file of one JSON object a line, one line a round from round 0 on.

    Args:
        path: of the file.
        num_rounds: rounds that are complete: further lines, of a round that was cut off, are dropped.

    Attributes:
        rows: the objects.

    Raises:
        RunFolderError: fewer lines, or lines that are not those of rounds 0, 1, ...
    """

    def __init__(self, path: Path, num_rounds: int) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if num_rounds == 0:
            return
        try:
            lines = read_bounded(path, _MAX_BYTES).decode().splitlines()[:num_rounds]
            self.rows = [json.loads(line) for line in lines]
            found = [row["round"] for row in self.rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"expected a line a round in {path}, got {error}") from error
        if found != list(range(num_rounds)):
            raise RunFolderError(f"expected rounds 0 to {num_rounds - 1} in {path}, got {len(found)} lines")

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one round and writes the file anew.

        Raises:
            OSError: the file stays as it was.
        """
        rows = [*self.rows, dict(row)]
        text = "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows)
        write_atomically(self._path, text.encode())
        self.rows = rows
