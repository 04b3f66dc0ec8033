"""Blocks of threads that run a kernel, in lockstep as far as their ways are one.

A lane is a thread, with a counter of its own that names a basic block. The lowest block runs, with all lanes
that are there (SIMT with reconvergence at the lowest counter). Registers and shared memory begin as noise.
Faults:

    global     outside of what was handed out, not readable or writable, misaligned (vectors included), a byte
               that one thread of the launch writes and another touches
    shared     outside, misaligned, and races: two threads touch a byte between two barriers, one writes it
    barriers   threads of a block at different barriers
    warp       shfl.sync, ldmatrix and mma.sync without all 32 threads at the same instruction

One schedule runs; races are found by who touched what, not by trying orders. Facts about PTX are those of
NVIDIA's "Parallel Thread Execution ISA".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.arithmetic import I32, I64, U8, U32, U64, UNSIGNED, Array
from ptx.kernel import Kernel
from ptx.memory import Memory, mark, touched_by_others
from ptx.parser import SHARED_ALIGNMENT, FaultError, UnknownPtxError

WARP = 32
MAX_LANES = 4096
# What is added to the counter of a lane that waits at a barrier, and the counter of one that is done.
_WAITS, _DONE = 1 << 20, 1 << 30
# Basic blocks that a machine runs before it is said to run on for ever.
_MOST_STEPS = 20_000_000
# Patterns of noise for each width: registers that were not written share them.
_NOISES = 7


class Machine:
    """The lanes of some blocks of a launch. `run` calls the functions of blocks, which call all else."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        blocks: range,
        grid: int,
        num_threads: int,
        parameters: bytes,
        dynamic_shared: int,
        seed: int,
    ):
        self._kernel, self._memory, self._parameters = kernel, memory, parameters
        self._num_threads, self._num_blocks = num_threads, len(blocks)
        n = self._n = len(blocks) * num_threads
        self._lane = np.arange(n)
        thread, block = self._lane % num_threads, self._lane // num_threads
        ones, zeros = np.ones(n, U32), np.zeros(n, U32)
        self.special = {
            "%tid.x": thread.astype(U32),
            "%ntid.x": ones * U32(num_threads),
            "%ctaid.x": (block + blocks.start).astype(U32),
            "%nctaid.x": ones * U32(grid),
            "%laneid": (thread % WARP).astype(U32),
        }
        for axis in "yz":
            self.special |= {f"%tid.{axis}": zeros, f"%ntid.{axis}": ones}
            self.special |= {f"%ctaid.{axis}": zeros, f"%nctaid.{axis}": ones}
        # Numbers of threads from 1 on, in the launch and in the block.
        self._in_launch = (blocks.start * num_threads + self._lane + 1).astype(I32)
        self._in_block = (thread + 1).astype(I32)
        generator = np.random.default_rng(seed)
        noise = [self._noise(generator) for _ in range(_NOISES)]
        bits = kernel.entry.register_bits
        self._registers: list[Any] = [noise[i % _NOISES][width] for i, width in enumerate(bits)]
        self._shared_bytes = kernel.entry.shared_bytes + dynamic_shared
        stride = -(-max(self._shared_bytes, 1) // SHARED_ALIGNMENT) * SHARED_ALIGNMENT
        shared = generator.integers(0, 256, stride * len(blocks), dtype=U8)
        self._cells: dict[int, Array] = {size: shared.view(UNSIGNED[8 * size]) for size in (1, 2, 4, 8)}
        self._origin = (block * stride).astype(I64)
        self._granule = kernel.shared_granule
        self._touched: Array = np.zeros((3, len(blocks), stride // self._granule), I32)
        self._wrote, self._read, self._updated = (table.reshape(-1) for table in self._touched)
        self._counter = np.zeros(n, I64)
        self.num_instructions = 0

    def _noise(self, generator: np.random.Generator) -> dict[int, Array]:
        words = generator.integers(0, 1 << 64, self._n, dtype=U64)
        made: dict[int, Array] = {bits: words.astype(dtype) for bits, dtype in UNSIGNED.items()}
        made[1] = (words & U64(1)).astype(bool)
        return made

    # --- what the functions of blocks call

    def array(self, value: Any) -> Array:
        return value if getattr(value, "ndim", 0) else np.full(self._n, value)

    def _active(self, mask: Array | None) -> Array:
        return self._lane if mask is None else np.flatnonzero(mask)

    def whole_warps(self, mask: Array | None, what: str) -> None:
        if mask is not None:
            by_warp = mask.reshape(-1, WARP)
            if (by_warp.any(1) != by_warp.all(1)).any():
                raise FaultError(f"{what} by a part of a warp")

    def _spread(self, values: list[Array], size: int, lanes: Array, mask: Array | None) -> list[Array]:
        """Values of the active lanes as arrays of all lanes."""
        if mask is None:
            return values
        spread = []
        for value in values:
            everywhere = np.zeros(self._n, UNSIGNED[8 * size])
            everywhere[lanes] = value
            spread.append(everywhere)
        return spread

    def load_param(self, address: Any, size: int, count: int, mask: Array | None, site: str) -> list[Any]:
        lanes = self._active(mask)
        at = np.atleast_1d(address if np.ndim(address) == 0 else address[lanes]).astype(I64)
        end = len(self._parameters) - size * count
        if at.size and ((at % (size * count)).any() or at.min() < 0 or at.max() > end):
            raise FaultError(f"parameter access outside or misaligned: {site}")
        if at.size and (at == at[0]).all():
            return list(np.frombuffer(self._parameters, UNSIGNED[8 * size], count, int(at[0])))
        cells = np.frombuffer(self._parameters[: len(self._parameters) // size * size], UNSIGNED[8 * size])
        return self._spread([cells[at // size + k] for k in range(count)], size, lanes, mask)

    def load_global(self, address: Any, size: int, count: int, mask: Array | None, site: str) -> list[Array]:
        lanes = self._active(mask)
        at = self.array(address)[lanes].astype(U64)
        values = self._memory.load(at, size, count, self._in_launch[lanes], site)
        return self._spread(values, size, lanes, mask)

    def store_global(self, address: Any, size: int, values: Any, mask: Array | None, site: str) -> None:
        lanes = self._active(mask)
        at = self.array(address)[lanes].astype(U64)
        self._memory.store(at, size, [self.array(v)[lanes] for v in values], self._in_launch[lanes], site)

    def _locate(self, address: Any, size: int, lanes: Array, site: str) -> tuple[Array, Array, Array]:
        """Place of each access in shared memory, its granules, and the numbers of the threads."""
        at = self.array(address)[lanes].astype(I64)
        if at.size and ((at % size).any() or at.min() < 0 or at.max() + size > self._shared_bytes):
            raise FaultError(f"shared access outside or misaligned: {site}")
        at = at + self._origin[lanes]
        granules = (at // self._granule)[:, None] + np.arange(max(size // self._granule, 1))
        return at, granules, self._in_block[lanes][:, None]

    def load_shared(self, address: Any, size: int, count: int, mask: Array | None, site: str) -> list[Array]:
        lanes = self._active(mask)
        at, granules, own = self._locate(address, size * count, lanes, site)
        if touched_by_others(self._wrote, granules, own) or touched_by_others(self._updated, granules, own):
            raise FaultError(f"shared race, read of another thread's write: {site}")
        mark(self._read, granules, own)
        return self._spread([self._cells[size][at // size + k] for k in range(count)], size, lanes, mask)

    def load_matrix(self, address: Any, mask: Array | None, site: str) -> list[Array]:
        """ldmatrix x4: lane 8 i + r names row r of matrix i, of which a lane gets 4 bytes of row lane / 4."""
        self.whole_warps(mask, "ldmatrix")
        rows = self.array(address)
        if (rows[self._active(mask)] % U32(16)).any():
            raise FaultError(f"shared access outside or misaligned: {site}")
        warp, lane = self._lane // WARP * WARP, self._lane % WARP
        part = (4 * (lane % 4)).astype(U32)
        return [
            self.load_shared(rows[warp + 8 * i + lane // 4] + part, 4, 1, mask, site)[0] for i in range(4)
        ]

    def store_shared(self, address: Any, size: int, values: Any, mask: Array | None, site: str) -> None:
        lanes = self._active(mask)
        at, granules, own = self._locate(address, size * len(values), lanes, site)
        if any(touched_by_others(table, granules, own) for table in (self._wrote, self._read, self._updated)):
            raise FaultError(f"shared race, write of a byte that another thread touched: {site}")
        mark(self._wrote, granules, own)
        if (self._wrote[granules] < 0).any():
            raise FaultError(f"shared race, two threads write at once: {site}")
        for k, value in enumerate(values):
            self._cells[size][at // size + k] = self.array(value)[lanes]

    def atomic(
        self, space: str, how: str, address: Any, size: int, value: Any, mask: Array | None, site: str
    ) -> Array:
        lanes = self._active(mask)
        if space == "shared":
            at, granules, own = self._locate(address, size, lanes, site)
            if touched_by_others(self._wrote, granules, own) or touched_by_others(self._read, granules, own):
                raise FaultError(f"shared race, atomic and plain access: {site}")
            mark(self._updated, granules, own)
            cells, places = self._cells[size], at // size
        else:
            at = self.array(address)[lanes].astype(U64)
            cells, places = self._memory.atomic(at, size, self._in_launch[lanes], site)
        old, values = np.zeros(self._n, UNSIGNED[8 * size]), self.array(value)
        for lane, place in zip(lanes, places, strict=True):
            old[lane] = before = cells[place]
            if how == "add":
                cells[place] = before + values[lane]
            else:
                cells[place] = max(before, values[lane]) if how == "max" else before | values[lane]
        return old

    def shuffle(self, how: str, a: Any, b: Any, c: Any, members: Any, mask: Array | None) -> Array:
        self.whole_warps(mask, "shfl.sync")
        a, b, c, members = (self.array(x) for x in (a, b, c, members))
        active = slice(None) if mask is None else mask
        if (members[active] != U32(0xFFFFFFFF)).any() or (c[active] & U32(0x1F1F) != U32(0x1F)).any():
            raise UnknownPtxError("shfl.sync of a part of a warp")
        lane = (self._lane % WARP).astype(U32)
        source = lane ^ (b & U32(31)) if how == "bfly" else b & U32(31)
        return np.asarray(a[self._lane // WARP * WARP + source])

    # --- control

    def run(self) -> None:
        """Run all lanes to their ends."""
        kernel, counter, registers = self._kernel, self._counter, self._registers
        blocks = kernel.entry.blocks
        for _ in range(_MOST_STEPS):
            index = int(counter.min())
            if index >= _WAITS:
                if index >= _DONE:
                    return
                self._release()
                continue
            mask = counter == index
            if index == len(blocks):
                counter[mask] = _DONE
                continue
            count = int(np.count_nonzero(mask))
            is_masked = count < self._n
            kernel.function(index, is_masked)(registers, mask if is_masked else None, self)
            kernel.covered[index] = 1
            end, length = blocks[index].end, blocks[index].length
            self.num_instructions += length * count
            if end.kind == "barrier":
                counter[mask] = index + _WAITS
                continue
            taken = mask
            if end.guard is not None:
                register, is_negated = end.guard
                taken = mask & (~registers[register] if is_negated else registers[register])
            counter[mask] = index + 1
            if end.kind == "branch":
                counter[taken] = end.target
            elif end.kind == "return":
                counter[taken] = _DONE
        raise FaultError(f"{kernel.name} does not end within {_MOST_STEPS} basic blocks")

    def _release(self) -> None:
        """Let the threads that wait at a barrier go on; those that are done do not keep them."""
        by_block = self._counter.reshape(self._num_blocks, self._num_threads)
        waits = by_block < _DONE
        some = waits.any(1)
        first = by_block.min(1)
        if (waits & (by_block != first[:, None])).any():
            raise FaultError("threads of a block wait at different barriers")
        if not waits[some].all():
            self._kernel.notes["barriers that exited threads missed"] += 1
        by_block[waits] += 1 - _WAITS
        self._touched[:, some] = 0


def launch(
    kernel: Kernel,
    memory: Memory,
    grid: int,
    num_threads: int,
    parameters: bytes,
    dynamic_shared: int = 0,
    seed: int = 7,
) -> int:
    """Run all blocks of a one-dimensional grid. Returns the number of instructions of all threads.

    Raises:
        FaultError: the kernel did what it must not.
        UnknownPtxError: it uses what the emulator does not know.
    """
    if num_threads > kernel.entry.max_threads or num_threads % WARP:
        raise FaultError(f"{num_threads} threads a block, at most {kernel.entry.max_threads}")
    if len(parameters) != kernel.entry.param_bytes:
        raise FaultError(
            f"{len(parameters)} bytes of parameters, {kernel.name} takes {kernel.entry.param_bytes}"
        )
    memory.begin_launch()
    at_once, total = max(1, MAX_LANES // num_threads), 0
    with np.errstate(all="ignore"):
        for first in range(0, grid, at_once):
            blocks = range(first, min(first + at_once, grid))
            machine = Machine(
                kernel, memory, blocks, grid, num_threads, parameters, dynamic_shared, seed + first
            )
            machine.run()
            total += machine.num_instructions
    return total
