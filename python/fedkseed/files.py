"""Files that are whole or not there: atomic writes, bounded reads, and one owner of a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

_TEMPORARY = ".tmp"


class FileTooLargeError(ValueError):
    """A file beyond what its reader accepts; nothing of it was read into memory."""


class FolderInUseError(RuntimeError):
    """Another process holds the folder."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes ``data`` so that after a crash at any instant ``path`` has its old content or the new one.

    A temporary file beside it is written, flushed to the disk and renamed, then the folder is flushed.

    Raises:
        OSError: no such folder, no space, no permission; the old content stays and nothing is left over.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes the temporary files of writers that were killed; the caller owns the folder (`FolderLock`)."""
    for leftover in Path(folder).glob(f".*{_TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """The file's content.

    Raises:
        FileTooLargeError: more than ``limit`` bytes; constant memory.
        OSError: as `open`.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FileTooLargeError(f"expected at most {limit:,} bytes in {path}, got more")
    return data


class FolderLock:
    """The only owner of a folder among all processes of this machine, from `__enter__` to `__exit__`.

    The lock (flock on the file ``.lock``) ends with the process, however it ends.

    Raises:
        FolderInUseError: on entering, if another process holds it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._path = Path(folder) / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FolderInUseError(
                f"expected {self._path.parent} to itself, got one that another process works in; "
                "wait for it or choose another folder"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

