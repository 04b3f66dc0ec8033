"""Global memory of the emulated GPU: parts of the host's, each access checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from ptx.arithmetic import I32, I64, U8, U64, Array
from ptx.parser import FaultError

READ, WRITE = 1, 2
#: Bytes whose reader and writer are remembered together; no kernel accesses fewer.
GRANULE = 2
ALIGNMENT = 256
_ADDRESS_BITS = 47


class _AddressSpace:
    """All memory of the process as an array of one element type, which `np.asarray` takes."""

    def __init__(self, size: int):
        shape = ((1 << _ADDRESS_BITS) // size - 1,)
        # Element i is at address size * (i + 1): NumPy takes no array at address 0.
        self.__array_interface__ = {
            "shape": shape,
            "typestr": f"<u{size}",
            "data": (size, False),
            "version": 3,
        }


class Memory:
    """An arena, and tensors of the host that were admitted. Nothing else may be touched.

    A byte that one thread of a launch writes may be neither read nor written by another.
    """

    def __init__(self, size: int = 1 << 24, seed: int = 1):
        raw = np.random.default_rng(seed).integers(0, 256, size + 4096, dtype=U8)
        skip = -raw.ctypes.data % 4096
        self.bytes: Array = raw[skip : skip + size]
        self.base, self.size, self._next = int(self.bytes.ctypes.data), size, ALIGNMENT
        self._cells: dict[int, Array] = {n: np.asarray(_AddressSpace(n)) for n in (1, 2, 4, 8)}
        self._rights: Array = np.zeros(size // GRANULE, U8)
        self._admitted: list[tuple[int, int, int]] = []
        self.begin_launch()

    def allocate(self, num_bytes: int, rights: int, skew: int = 0) -> Array:
        """Bytes of the arena, `skew` after a multiple of ALIGNMENT, amid bytes that are no one's."""
        at = -(-self._next // ALIGNMENT) * ALIGNMENT + skew
        self._next = at + num_bytes + ALIGNMENT
        if self._next > self.size:
            raise MemoryError(f"the arena of {self.size} bytes is full")
        self._rights[at // GRANULE : -(-(at + num_bytes) // GRANULE)] = rights
        return self.bytes[at : at + num_bytes]

    @property
    def allocated_end(self) -> int:
        """Where the last allocation and what is no one's behind it end."""
        return self._next

    @contextmanager
    def admitted(self, *tensors: Tensor, rights: int = READ | WRITE) -> Iterator[None]:
        """Let kernels use tensors of the host that lie outside of the arena, within a block."""
        before = list(self._admitted)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            inside = self.base <= start < self.base + self.size
            if storage.nbytes() and not inside and (start, storage.nbytes(), rights) not in self._admitted:
                self._admitted.append((start, storage.nbytes(), rights))
        try:
            yield
        finally:
            self._admitted = before

    def begin_launch(self) -> None:
        """Forget who read and wrote what."""
        regions = sorted([(self.base, self.size, -1), *self._admitted])
        self._starts = np.array([start for start, _, _ in regions], U64)
        self._sizes = np.array([size for _, size, _ in regions], U64)
        counts = [-(-size // GRANULE) for _, size, _ in regions]
        self._shadows = np.array([0, *np.cumsum(counts)[:-1]], I64)
        self._launch_rights = np.concatenate(
            [
                self._rights if rights < 0 else np.full(count, rights, U8)
                for (_, _, rights), count in zip(regions, counts, strict=True)
            ]
        )
        self._writer, self._reader, self._updater = np.zeros((3, sum(counts)), I32)

    def _locate(self, address: Array, size: int, rights: int, own: Array, site: str) -> Array:
        """The first granule of each access: its place in the records of rights, readers and writers."""
        if (address & U64(size - 1)).any():
            raise FaultError(f"misaligned global access of {size} bytes: {site}")
        region: Any = 0
        if len(self._starts) > 1:
            region = np.maximum(np.searchsorted(self._starts, address, side="right") - 1, 0)
        at = address - self._starts[region]
        sizes = self._sizes[region]
        bad = (at > sizes) | (at + U64(size) > sizes)
        granule = np.where(bad, U64(0), at // U64(GRANULE)).astype(I64) + self._shadows[region]
        last = np.minimum(granule + (size - 1) // GRANULE, self._launch_rights.size - 1)
        bad |= (self._launch_rights[granule] & self._launch_rights[last] & U8(rights)) != rights
        if bad.any():
            i = np.flatnonzero(bad)[0]
            who = f"{int(bad.sum())} threads, one is {own[i]}, {size} bytes"
            raise FaultError(f"global access outside of memory ({who}): {site}")
        return granule

    def load(self, address: Array, size: int, count: int, own: Array, site: str) -> list[Array]:
        """`count` numbers of `size` bytes from each address. own: numbers of the threads, from 1 on."""
        granule = self._locate(address, size * count, READ, own, site)
        if (self._launch_rights[granule] & U8(WRITE)).any():
            granules, mine = _granules(granule, size * count), own[:, None]
            if touched_by_others(self._writer, granules, mine):
                raise FaultError(f"global race, reads what another thread wrote: {site}")
            if touched_by_others(self._updater, granules, mine):
                raise FaultError(f"global race, reads what another thread updates: {site}")
            mark(self._reader, granules, mine)
        cells = (address // U64(size)).astype(I64) - 1
        return [self._cells[size][cells + k] for k in range(count)]

    def store(self, address: Array, size: int, values: list[Array], own: Array, site: str) -> None:
        granule = self._locate(address, size * len(values), WRITE, own, site)
        granules, mine = _granules(granule, size * len(values)), own[:, None]
        if touched_by_others(self._writer, granules, mine):
            raise FaultError(f"global race, two threads write the same byte: {site}")
        if touched_by_others(self._reader, granules, mine):
            raise FaultError(f"global race, writes what another thread read: {site}")
        if touched_by_others(self._updater, granules, mine):
            raise FaultError(f"global race, writes what another thread updates: {site}")
        self._writer[granules] = mine
        if (self._writer[granules] != mine).any():
            raise FaultError(f"global race, two threads write the same byte at once: {site}")
        cells = (address // U64(size)).astype(I64) - 1
        for k, value in enumerate(values):
            self._cells[size][cells + k] = value

    def atomic(self, address: Array, size: int, own: Array, site: str) -> tuple[Array, Array]:
        """What an atomic operation works on: an array of numbers, and the place of each thread's in it."""
        granules, mine = _granules(self._locate(address, size, READ | WRITE, own, site), size), own[:, None]
        if any(touched_by_others(table, granules, mine) for table in (self._writer, self._reader)):
            raise FaultError(f"global race, atomic and plain access: {site}")
        mark(self._updater, granules, mine)
        return self._cells[size], (address // U64(size)).astype(I64) - 1


class OpenMemory(Memory):
    """All memory of the process, for code that makes its tensors itself.

    Accesses are checked for alignment alone: neither bounds nor races are looked at, and a wild address ends
    the process.
    """

    def _cells_at(self, address: Array, size: int, count: int, site: str) -> Array:
        if (address & U64(size * count - 1)).any():
            raise FaultError(f"misaligned global access of {size * count} bytes: {site}")
        return (address // U64(size)).astype(I64) - 1

    def load(self, address: Array, size: int, count: int, own: Array, site: str) -> list[Array]:
        cells = self._cells_at(address, size, count, site)
        return [self._cells[size][cells + k] for k in range(count)]

    def store(self, address: Array, size: int, values: list[Array], own: Array, site: str) -> None:
        cells = self._cells_at(address, size, len(values), site)
        for k, value in enumerate(values):
            self._cells[size][cells + k] = value

    def atomic(self, address: Array, size: int, own: Array, site: str) -> tuple[Array, Array]:
        return self._cells[size], self._cells_at(address, size, 1, site)


def _granules(first: Array, num_bytes: int) -> Array:
    """All granules of accesses whose first ones are given."""
    return first[:, None] + np.arange(max(num_bytes // GRANULE, 1))


def touched_by_others(table: Array, places: Array, own: Array) -> bool:
    """Whether `mark` noted another thread at one of the places."""
    seen = table[places]
    return bool(((seen != 0) & (seen != own)).any())


def mark(table: Array, places: Array, own: Array) -> None:
    """Note who touched places; -1 for more than one thread."""
    seen = table[places]
    new = np.where((seen == 0) | (seen == own), own, I32(-1))
    table[places] = new
    lost = table[places] != new
    if lost.any():
        table[places[lost]] = -1
