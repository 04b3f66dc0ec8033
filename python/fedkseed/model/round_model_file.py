"""The model of a round in a file, so that a process that is started for every message need not rebuild it."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkseed.files import folder_for_a_while, is_leftover, put_in_place, remove_unless_held

logger = logging.getLogger("fedkseed")

_MAGIC = b"FKSM"
_SUFFIX = ".round"
#: Of the beginning of each tensor in the file, in bytes.
_ALIGNMENT = 64
_KEY_BYTES = 32


class RoundModelFile:
    """A file with the round's weights, found by what they are; for `fedkseed.WorkingCopy`'s ``round_model``.

    A message whose model is in the file costs a copy instead of rebuilding. The file is named by w0, by what
    of it is tuned, and by a hash of the coefficients and all that belongs to them. Whoever writes it removes
    that of the round before first, and what a killed process did not finish. It is written elsewhere, flushed
    and renamed, readable by this user alone, and begins and ends with its own name's hash, so that a part of
    one is not taken for a model. Where it cannot be written (no space, a read-only folder) the model is
    rebuilt every time, which is said once, as a warning of the logger "fedkseed".

    Args:
        folder: for the file, made if it is not there; on a memory disk (/dev/shm) it is read the fastest. It
            takes as many bytes as the tuned weights.

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
            data = _mapped(self._path(w0, key), size)
        except OSError:  # rebuilding needs no file; what is in the way is said by `save`
            return False
        mark = np.frombuffer(_MAGIC + key, np.uint8)
        if data is None or not all(
            np.array_equal(end, mark) for end in (data[: mark.size], data[-mark.size :])
        ):
            return False
        with torch.no_grad():
            for weight, end in zip(weights, ends, strict=True):
                part = torch.from_numpy(data[end - weight.nbytes : end])
                weight.copy_(part.view(weight.dtype).view(weight.shape))
        return True

    def save(self, w0: bytes, wanted: Sequence[bytes], weights: Sequence[Tensor]) -> None:
        """Writes the weights of a round; those of other rounds of the same model are removed before."""
        key = _key(w0, wanted)
        target = self._path(w0, key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for superseded in self.folder.glob(f"{_prefix(w0)}-*{_SUFFIX}"):
                superseded.unlink(missing_ok=True)
            for left in self.folder.glob(f".{_prefix(w0)}-*"):
                if is_leftover(left):
                    remove_unless_held(left)
            with folder_for_a_while(target) as staging:
                _write(staging / target.name, _MAGIC + key, weights)
                put_in_place(staging / target.name, target)
        except OSError as error:
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


def _mapped(path: Path, size: int) -> NDArray[np.uint8] | None:
    """A file's bytes; None unless it is this user's and of that size. Writing to them does not reach it.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    # Not blocking: at a pipe of that name one would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_size != size:
            return None
        return np.memmap(file, np.uint8, "c")


def _layout(weights: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor ends in the file, and the size of the file."""
    ends, place = [], len(_MAGIC) + _KEY_BYTES
    for weight in weights:
        place = -(-place // _ALIGNMENT) * _ALIGNMENT + weight.nbytes
        ends.append(place)
    return ends, place + len(_MAGIC) + _KEY_BYTES


def _write(path: Path, mark: bytes, weights: Sequence[Tensor]) -> None:
    ends, size = _layout(weights)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # no space is found out before anything is written
        file.write(mark)
        for weight, end in zip(weights, ends, strict=True):
            file.seek(end - weight.nbytes)
            file.write(weight.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        file.write(mark)
