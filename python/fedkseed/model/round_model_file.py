"""The model of a round in a file, so that a process that is started for every message need not rebuild it."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("fedkseed")

_MAGIC = b"FKSM"
_SUFFIX = ".round"
#: Of the beginning of each tensor in the file, in bytes.
_ALIGNMENT = 64
_KEY_BYTES = 32


class RoundModelFile:
    """A file with the round's weights, found by what they are; for `fedkseed.WorkingCopy`'s ``round_model``.

    A message whose model is in the file costs a copy instead of rebuilding. The file is named by w0, by what
    of it is tuned, and by a hash of the coefficients and all that belongs to them. It is written beside its
    name, flushed and renamed, readable by this user alone, and removes the file of the round before and what
    killed processes left unfinished. It begins and ends with its own name's hash, so that a part of one is
    not taken for a model. Where it cannot be written (no space, a read-only folder) the model is rebuilt
    every time, which is said once, as a warning of the logger "fedkseed".

    Args:
        folder: for the file, made if it is not there; on a memory disk (/dev/shm) it is read the fastest. It
            takes as many bytes as the tuned weights, twice as many while it is written.

    Attributes:
        folder: as given.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._has_told = False

    def load(self, w0: bytes, wanted: Sequence[bytes], weights: Sequence[Tensor]) -> bool:
        """Copies the file's weights into these, if it holds those wanted.

        Args:
            w0: hash of the model, and of which parameters are tuned.
            wanted: what the round's model follows from, beside w0.
            weights: of the shapes and dtypes of what was saved; written.
        """
        key = _key(w0, wanted)
        ends, size = _layout(weights)
        try:
            descriptor = os.open(self._path(w0, key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            is_own = found.st_uid == os.getuid() and stat.S_ISREG(found.st_mode)
            if not is_own or found.st_size != size:
                return False
            data = np.memmap(
                file, np.uint8, "c"
            )  # what is written here, if anything, does not reach the file
        mark = np.frombuffer(_MAGIC + key, np.uint8)
        if not (np.array_equal(data[: mark.size], mark) and np.array_equal(data[-mark.size :], mark)):
            return False
        with torch.no_grad():
            for weight, end in zip(weights, ends, strict=True):
                part = torch.from_numpy(data[end - weight.nbytes : end])
                weight.copy_(part.view(weight.dtype).view(weight.shape))
        return True

    def save(self, w0: bytes, wanted: Sequence[bytes], weights: Sequence[Tensor]) -> None:
        """Writes the weights of a round, and removes those of the rounds before of the same w0."""
        key = _key(w0, wanted)
        target = self._path(w0, key)
        temporary = self.folder / f".{target.name}.{os.getpid()}-{threading.get_native_id()}.tmp"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_unfinished(self.folder, w0)
            _write(temporary, target, _MAGIC + key, weights)
            for other in self.folder.glob(f"{_prefix(w0)}-*{_SUFFIX}"):
                if other != target:
                    other.unlink(missing_ok=True)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            if not self._has_told:
                self._has_told = True
                logger.warning(
                    "the round's model is rebuilt for every message, as it cannot be kept in %s: %s",
                    self.folder,
                    error,
                )

    def _path(self, w0: bytes, key: bytes) -> Path:
        return self.folder / f"{_prefix(w0)}-{key.hex()[:32]}{_SUFFIX}"


def _prefix(w0: bytes) -> str:
    return w0.hex()[:16]


def _key(w0: bytes, wanted: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256(w0)
    for part in wanted:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _layout(weights: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor ends in the file, and the size of the file."""
    ends, place = [], len(_MAGIC) + _KEY_BYTES
    for weight in weights:
        place = -(-place // _ALIGNMENT) * _ALIGNMENT + weight.nbytes
        ends.append(place)
    return ends, place + len(_MAGIC) + _KEY_BYTES


def _write(path: Path, target: Path, mark: bytes, weights: Sequence[Tensor]) -> None:
    """Writes a file, flushes it to the disk and renames it; it is locked until then."""
    ends, size = _layout(weights)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        with suppress(OSError):  # a file system without locks: nobody can tell, and nobody removes
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(file.fileno(), 0, size)  # no space is found out before anything is written
        file.write(mark)
        for weight, end in zip(weights, ends, strict=True):
            file.seek(end - weight.nbytes)
            file.write(weight.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        file.write(mark)
        file.flush()
        os.fsync(file.fileno())  # else a crash of the machine may leave both marks and zeros between them
        os.replace(path, target)


def _remove_unfinished(folder: Path, w0: bytes) -> None:
    """Removes what processes that were killed had begun to write: what nobody holds a lock of."""
    for unfinished in folder.glob(f".{_prefix(w0)}-*{_SUFFIX}.*.tmp"):
        with suppress(OSError):  # gone, locked, or not this user's
            descriptor = os.open(unfinished, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unfinished.unlink()
            finally:
                os.close(descriptor)
