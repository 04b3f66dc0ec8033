"""The folder of a run: the server's state, the ledgers, the metrics of each round and what they took.

    settings.json        what the run was started with, if its caller keeps that here
    server.state         the server's, see `federation.state`; server.state.1: the one before it
    baseline.safetensors in its place, of a run that is no FedKSeed: its weights and its optimizer's state
    clients.json         what clients and task compute with; a resumed run must have the same
    ledger.safetensors   the model after the last round that is complete
    best.safetensors     the model after the best of them, see `best_ledger`
    metrics.jsonl        one line a round; the same bytes in every run of the same configuration
    timings.jsonl        one line a round; seconds, which differ
    .lock                held by the process that works here

The clients' settings are written once, and again if the first round shows that "auto" has to be another
storage mode. After each round a line is added to metrics and timings, the ledger is written anew and renamed,
then the server's state, then the best ledger. After a crash at any instant the state says which lines count,
and everything else is brought to it. If the last state is damaged, the one before it counts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fedkseed.documents import DocumentError, parse_json, read_json, shown
from fedkseed.federation.state import StateError, StateFolder
from fedkseed.files import FolderLock, FolderNotEmptyError, is_leftover, remove_leftovers, write_atomically
from fedkseed.storage import StorageOptions, mode_of_text

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
LEDGER, BEST = "ledger.safetensors", "best.safetensors"
PICTURE = "plot.png"
CLIENTS, SETTINGS = "clients.json", "settings.json"
#: The state of a run of another method than FedKSeed.
BASELINE = "baseline.safetensors"
#: What a run writes only after its first state.
_AFTER_A_STATE = (LEDGER, BEST, METRICS, TIMINGS, CLIENTS)
_TASK = "task"
#: Settings of clients that stand in the file only where they are not these.
_CLIENT_DEFAULTS: Mapping[str, Any] = {"max_loss_gap": 0.0}


class RunFolderError(ValueError):
    """A folder that does not hold what a run left there."""


class RunFolder:
    """The folder of a run, locked for this process until `close`; `start`, `reopen` and `take` make one.

    A context manager: leaving it closes it.

    Attributes:
        path: of the folder.
        lock: of the folder.
        resumes: whether a state was there when it was opened: the run goes on with that, else with round 0.
        notice: one line that says that an older state had to be taken, and why; "" if not. Known once a
            simulation has been made with the folder.
    """

    def __init__(
        self, path: Path, lock: FolderLock, made: tuple[Path, ...] = (), is_new: bool = False
    ) -> None:
        self.path = path
        self.lock = lock
        self.resumes = holds_state(path)
        self.notice = ""
        self._made = made
        self._is_new = is_new
        self._wrote_settings = False

    @classmethod
    def start(cls, path: Path) -> RunFolder:
        """A folder for a new run, made if it is not there; nothing is written into another one.

        Raises:
            FolderNotEmptyError: something is in it, or it is no folder.
            FolderInUseError: another process has just taken it.
            OSError: it cannot be made or written.
        """
        while True:
            made = tuple(folder for folder in (path, *path.parents) if not folder.exists())
            _check_empty(path)
            path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another start has just given it up
                lock = FolderLock(path).__enter__()
                break
        folder = cls(lock.folder, lock, made, is_new=True)
        try:
            _check_empty(path)
            remove_leftovers(path)
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """The folder of a run to go on with, at round 0 if it was stopped before its first state.

        Raises:
            RunFolderError: not the folder of a run, or one that has lost its state.
            FolderInUseError: another process works in it.
            OSError: it cannot be written.
        """
        if not (path / SETTINGS).exists() and not holds_state(path):
            check_unused(path)
            raise RunFolderError(
                f"expected the folder of a run with {SETTINGS} or {StateFolder.FILE}, got {path} without them"
            )
        return cls.take(path)

    @classmethod
    def take(cls, path: Path) -> RunFolder:
        """A folder that a run may be in or may be begun in, made if it is not there.

        Raises:
            RunFolderError: it has files of a run, but no state any more.
            FolderInUseError: another process works in it.
            OSError: it cannot be made or written.
        """
        path.mkdir(parents=True, exist_ok=True)
        check_unused(path)
        lock = FolderLock(path).__enter__()
        try:
            remove_leftovers(path)
            check_unused(path)
            return cls(lock.folder, lock)
        except BaseException:
            lock.__exit__(None, None, None)
            raise

    @property
    def settings_path(self) -> Path:
        """The file of `write_settings`."""
        return self.path / SETTINGS

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Keeps the settings of the run; `read_settings` gives them back.

        Raises:
            LockLostError: the folder is not this process' any more.
            ValueError: they cannot be kept: too large, or not what JSON has.
            OSError: the folder cannot be written.
        """
        self.lock.check()
        text = json.dumps(dict(settings), indent=2, allow_nan=False) + "\n"
        parse_json(text, SETTINGS)
        write_atomically(self.settings_path, text.encode())
        self._wrote_settings = True

    def read_settings(self) -> dict[str, Any]:
        """The settings that the run was started with; what they mean is for the caller to check.

        Raises:
            RunFolderError: there are none, or the file is damaged.
        """
        return object_in(self.settings_path, "the settings of a run")

    def abandon(self) -> None:
        """Closes it, and takes back what `start` made and wrote if the run has saved no state."""
        if not self._is_new or holds_state(self.path):
            self.close()
            return
        if self._wrote_settings:
            self.settings_path.unlink(missing_ok=True)
        self.lock.remove()
        with contextlib.suppress(OSError):  # somebody else has put something there
            for folder in self._made:
                folder.rmdir()

    def close(self) -> None:
        """Ends the ownership."""
        self.lock.__exit__(None, None, None)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def holds_state(path: Path) -> bool:
    """Whether a run of any method has saved its state in the folder."""
    return StateFolder.holds_state_at(path) or (path / BASELINE).exists()


def check_unused(path: Path) -> None:
    """Raises if a run was in the folder whose state is gone: nothing of it may be overwritten.

    Raises:
        RunFolderError: names what is there.
    """
    if holds_state(path):
        return
    if found := [name for name in _AFTER_A_STATE if (path / name).exists()]:
        raise RunFolderError(
            f"expected {StateFolder.FILE} beside {', '.join(found)} in {path}, got none: the run that wrote "
            "them cannot go on, and they are not overwritten; choose another folder, or move them away"
        )


def _check_empty(path: Path) -> None:
    """Raises if a folder is there with more in it than a start that was cut off leaves."""
    if path.is_symlink() and not path.exists():
        raise FolderNotEmptyError(f"expected a new or an empty folder for the run, got {path}, a broken link")
    if not path.exists():
        return
    if not path.is_dir():
        raise FolderNotEmptyError(f"expected a new or an empty folder for the run, got {path}, a file")
    names = sorted(entry.name for entry in path.iterdir() if not is_leftover(entry))
    if set(names) <= {FolderLock.FILE}:
        return
    if SETTINGS in names or holds_state(path):
        advice = f"which holds a run; name another one, or --resume {path}"
    else:
        advice = f"which holds {names[-1]}; name another one"
    raise FolderNotEmptyError(f"expected a new or an empty folder for the run, got {path}, {advice}")


def check_client_settings(
    path: Path, settings: Mapping[str, Any], task: Mapping[str, Any] | None = None
) -> None:
    """Raises unless the run in the folder has these settings, or was begun before they were kept.

    Args:
        path: of the file.
        settings: by name; what `write_client_settings` takes.
        task: the task's own, by name.

    Raises:
        StateError: the run has another value; says in which setting, and names both.
        RunFolderError: the file cannot be read, or is not one of settings.
    """
    if not path.exists():
        return
    found = object_in(path, "the settings of the clients")
    kept = found.pop(_TASK, {})
    ours, theirs = {**_CLIENT_DEFAULTS, **settings}, {**_CLIENT_DEFAULTS, **found}
    if ours.keys() != theirs.keys() or not isinstance(kept, dict):
        raise RunFolderError(
            f"expected {', '.join(settings)} in {path}, got {shown(', '.join(found) or 'nothing')}"
        )
    given = _as_read(task or {})
    for whose, wanted, began in (("clients", ours, theirs), ("a task", given, kept)):
        for name, value in began.items():
            if name not in wanted or wanted[name] != value:
                other = (
                    "its data, template or tokenizer are others by now: resume with those that it began with"
                    if whose == "a task"
                    else "resume with the configuration that it began with"
                )
                raise StateError(
                    f"expected {whose} with {shown(name)} {_brief(value)}, which the run in {path.parent} "
                    f"began with, got {_brief(wanted.get(name, 'none'))}; {other}"
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
    settings = object_in(path, "the settings of the clients")
    try:
        return mode_of_text(settings.get("storage"))
    except ValueError as error:
        raise RunFolderError(f"expected a storage mode in {path}, got {shown(error)}") from error


def write_client_settings(
    path: Path, settings: Mapping[str, Any], task: Mapping[str, Any] | None = None
) -> None:
    """Keeps what `check_client_settings` compares.

    Raises:
        OSError: the file stays as it was.
    """
    kept = {**settings, _TASK: _as_read(task)} if task else dict(settings)
    write_atomically(path, (json.dumps(kept, indent=2) + "\n").encode())


def _brief(value: Any) -> str:
    """The value for a message; of a digest its beginning."""
    text = shown(value)
    return f"{text[:12]}..." if len(text) >= 32 and text.isalnum() else text


def check_task_settings(task: Mapping[str, Any]) -> None:
    """Raises for settings of a task that could not be kept and compared.

    Raises:
        ValueError: not what JSON has, or too large.
    """
    _as_read(task)


def _as_read(task: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they come back out of a file."""
    try:
        read: dict[str, Any] = parse_json(json.dumps(dict(task), allow_nan=False), "the task's settings")
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected settings of a task that JSON can keep, got: {error}") from error
    return read


def object_in(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file of a run.

    Raises:
        RunFolderError: the file cannot be read, or holds something else; ``what`` names what was expected.
    """
    try:
        found = read_json(path)
    except (OSError, DocumentError) as error:
        raise RunFolderError(f"expected {what} in {path}, got: {error}") from error
    if not isinstance(found, dict):
        raise RunFolderError(f"expected {what} in {path}, got a {type(found).__name__}")
    return found
