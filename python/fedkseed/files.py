"""Files and folders that are whole or not there: atomic writes, bounded reads, one owner of a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar

#: What `_temporary_beside` makes: .NAME.PROCESS-THREAD.tmp
_TEMPORARY = re.compile(r"\..+\.[0-9]+-[0-9]+\.tmp", re.DOTALL)


class FileTooLargeError(ValueError):
    """A file beyond what its reader accepts; nothing of it was read into memory."""


class FolderInUseError(RuntimeError):
    """Somebody else holds the folder: another process, or another owner in this one."""


class LockLostError(FolderInUseError):
    """The lock file of a folder was deleted or replaced while its owner worked: another may be in by now."""


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
        temporary.write_bytes(data)
        put_in_place(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put_in_place(written: Path, target: Path) -> None:
    """Flushes a file to the disk and renames it to ``target``, on the same disk, then flushes the folder.

    Raises:
        OSError: no space, no permission; what is at ``target`` stays.
    """
    _flush(written)
    os.replace(written, target)
    _flush(target.parent)


@contextmanager
def folder_for_a_while(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A context whose value is an empty folder beside ``path``; it is removed with all in it at the end.

    If the process is killed, `remove_leftovers` removes it.

    Raises:
        OSError: no such parent folder, no space, no permission.
    """

    def make() -> Path:
        folder = _temporary_beside(Path(path))
        folder.mkdir()
        return folder

    with held_folder(make) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


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

    def make() -> Path:
        staging = _temporary_beside(target)
        staging.mkdir()
        return staging

    with held_folder(make) as staging:
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


@contextmanager
def held_folder(make: Callable[[], Path]) -> Iterator[Path]:
    """A context whose value is a folder that ``make`` makes anew; `remove_unless_held` leaves it alone.

    That ends with the block, and with the process.

    Raises:
        OSError: what ``make`` raises.
    """
    while True:
        folder = make()
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # a file system without locks: nobody can tell, and nobody removes
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(folder, descriptor):
                continue  # removed as a leftover before the lock was there
            yield folder
            return
        finally:
            os.close(descriptor)


def remove_unless_held(folder: Path) -> None:
    """Removes a folder with all in it unless it is a link or a process holds it (`held_folder`).

    Raises:
        OSError: it cannot be removed; not if it is gone already.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what writers that were killed left; the caller owns the folder (`FolderLock`).

    Known by the names that the writers here give; nothing else is touched and no link is followed.

    Raises:
        OSError: a leftover cannot be removed.
    """
    for leftover in Path(folder).iterdir():
        if not is_leftover(leftover):
            continue
        if leftover.is_dir():
            remove_unless_held(leftover)
        elif leftover.is_file():
            leftover.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether the name is one that the writers here give to what they have not finished."""
    return _TEMPORARY.fullmatch(path.name) is not None and not path.is_symlink()


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

    Args:
        folder: that is there.

    Attributes:
        folder: as given, absolute and without links.

    Raises:
        FolderInUseError: on entering, if another process holds it, or another lock in this one; says which.
    """

    FILE = ".lock"
    #: The lock files that are held here, with the process: what it held at a fork is not the child's.
    _held: ClassVar[set[tuple[int, int, int]]] = set()

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).resolve()
        self._path = self.folder / self.FILE
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(self._path, descriptor):
                    self._descriptor = descriptor
                    self._held.add(_in_this_process(descriptor))
                    return self
                os.close(descriptor)  # the owner before has just deleted it
            except BlockingIOError:
                is_here = _in_this_process(descriptor) in self._held
                os.close(descriptor)
                who, what = "another process works in", "wait for it"
                if is_here:
                    who, what = "this process works in already", "close() the server or run that has it"
                raise FolderInUseError(
                    f"expected {self.folder} to itself, got one that {who}; {what} or choose another folder"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise

    def check(self) -> None:
        """Raises unless this is still the only owner.

        Raises:
            LockLostError: the lock file is not the one that was locked.
        """
        if self._descriptor is None or not _is_at(self._path, self._descriptor):
            raise LockLostError(
                f"expected {self._path} to stay as long as a run works in {self.folder}, got it deleted or "
                "replaced; another run may have begun there, so nothing more is written: see that none works "
                "in the folder, then resume"
            )

    def remove(self) -> None:
        """Deletes the lock file and ends the ownership: for a folder that is not wanted after all."""
        if self._descriptor is not None and _is_at(self._path, self._descriptor):
            self._path.unlink(missing_ok=True)
        self.__exit__(None, None, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            self._held.discard(_in_this_process(self._descriptor))
            os.close(self._descriptor)
            self._descriptor = None


def _temporary_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{threading.get_native_id()}.tmp")


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the name still leads to what was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_this_process(descriptor: int) -> tuple[int, int, int]:
    """A file as it is known in this process."""
    found = os.fstat(descriptor)
    return os.getpid(), found.st_dev, found.st_ino


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
