"""Files of resident workers beside their sockets: who may start one, what nobody owns, who writes a log."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Of the name of socket, lock and log; a suffix follows.
NAME_LENGTH = 16
SUFFIX = ".socket"
_LOCK = re.compile(rf"[0-9a-f]{{{NAME_LENGTH}}}\.lock")
#: So long a log stays after its last word: who looks for the reason of a worker's end finds it.
_SECONDS_TO_KEEP = 24 * 3600.0


@contextmanager
def alone(lock: Path, wait: bool = True) -> Iterator[bool]:
    """A context that one caller at a time is in: two that start a worker end with one.

    Its value says whether the lock is held; without ``wait`` it may not be.
    """
    while True:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if is_at(lock, file.fileno()):
                yield True
                return
        # Removed as a leftover before the lock was there: the next caller would take another one.


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the name leads to what was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def accepts(path: Path) -> bool:
    """Whether somebody accepts connections at a socket's name; busy with a message counts."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        try:
            connection.connect(str(path))
        except BlockingIOError:
            return True  # more callers wait than it lets in
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def remove_abandoned(folder: Path) -> None:
    """Removes socket, lock and log of workers that ended a day ago or earlier.

    Nothing goes whose lock somebody holds (a caller waits for the worker to load), whose socket accepts, or
    whose log was written since.
    """
    for lock in folder.iterdir():
        if not _LOCK.fullmatch(lock.name) or lock.is_symlink() or not _is_old(lock):
            continue
        with suppress(OSError), alone(lock, wait=False) as is_held:
            if is_held and not accepts(lock.with_suffix(SUFFIX)):
                for suffix in (SUFFIX, ".log", ".lock"):
                    lock.with_suffix(suffix).unlink(missing_ok=True)


def writers(log: Path) -> list[int]:
    """Processes of this user that lead a session and say what they say into this log: workers of it."""
    found = []
    for entry in Path("/proc").iterdir():
        # A process that ends meanwhile, or another user's.
        with suppress(OSError):
            pid = int(entry.name) if entry.name.isdecimal() else 0
            if pid and os.getsid(pid) == pid and os.path.samefile(entry / "fd" / "1", log):
                found.append(pid)
    return found


def _is_old(lock: Path) -> bool:
    """Whether lock and log were written long ago; a lock is when its worker is started."""
    times = []
    for path in (lock, lock.with_suffix(".log")):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times, default=0.0) < time.time() - _SECONDS_TO_KEEP
