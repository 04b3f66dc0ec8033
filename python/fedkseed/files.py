"""Files and folders that are whole or not there: atomic writes, bounded reads, one owner of a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_TEMPORARY = ".tmp"


class FileTooLargeError(ValueError):
    """A file beyond what its reader accepts; nothing of it was read into memory."""


class FolderInUseError(RuntimeError):
    """Another process holds the folder."""


class FolderNotEmptyError(ValueError):
    """A folder that was to be made is there already and holds something, or a file has its name."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes ``data`` so that after a crash at any instant ``path`` has its old content or the new one.

    A temporary file beside it is written, flushed to the disk and renamed, then the folder is flushed.

    Raises:
        OSError: no such folder, no space, no permission; the old content stays and nothing is left over.
    """
    target = Path(path)
    temporary = _temporary_beside(target)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(target.parent)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A context whose value is an empty folder to write into; it becomes ``path`` when the block ends well.

    The folder lies beside ``path``, is flushed to the disk and renamed. If the block raises, it is removed.

    Raises:
        FolderNotEmptyError: ``path`` is there and is not an empty folder; on entering, or at the end if
            somebody filled it meanwhile.
        OSError: no such parent folder, no space, no permission.
    """
    target = Path(os.path.abspath(path))
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise _not_empty(target)
    staging = _temporary_beside(target)
    staging.mkdir()
    try:
        yield staging
        for folder, _, names in os.walk(staging):
            for name in (*names, "."):
                _flush(Path(folder, name))
        try:
            os.replace(staging, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _not_empty(target) from error
            raise
    except BaseException:
        shutil.rmtree(staging)
        raise
    _flush(target.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what writers that were killed left; the caller owns the folder (`FolderLock`)."""
    for leftover in Path(folder).glob(f".*{_TEMPORARY}"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
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

    The lock (flock on the file ``.lock``) ends with the process, however it ends; a child that was forked
    (not spawned) inside holds it too, as long as it lives.

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


def _temporary_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{threading.get_native_id()}{_TEMPORARY}")


def _flush(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_empty(target: Path) -> FolderNotEmptyError:
    return FolderNotEmptyError(
        f"expected a new or an empty folder, got {target}, which is there already; choose another name"
    )
