"""Launches of the Triton kernels for checked operands and terms, on torch's current stream.

Only tensors of the caller are written, and nothing waits for the device. What is allocated: the tables of a
list (once for a prepared one) and, for three terms or more, the terms.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fedkseed_kernels.backends.triton import noise
from fedkseed_kernels.backends.triton.interpreter import exact_arithmetic
from fedkseed_kernels.backends.triton.kernels import runs_kernel, segments_kernel
from fedkseed_kernels.backends.triton.tables import (
    OCTET,
    RADEMACHER_GROUP,
    Kind,
    KindTables,
    Table,
    make_tables,
)
from fedkseed_kernels.backends.triton.terms import (
    PackedTerms,
    count_skipped,
    pack_device_terms,
    pack_host_terms,
    placed,
)
from fedkseed_kernels.operands import DeviceTerms, Operands, Terms, upload

#: True when TRITON_INTERPRET=1 was set before Triton was imported: the kernels then run on the CPU.
IS_INTERPRETED = not isinstance(segments_kernel, JITFunction)

ELEMENT_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
# Octets that the tables count in.
TILE = 4096
# Below this many tiles a program takes one block instead of a tile, so that small lists fill a GPU too.
FEW_TILES = 1024


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where launches go within a block: Triton takes torch's current device, or its own interpreter."""
    return exact_arithmetic() if IS_INTERPRETED else torch.cuda.device(device)


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp of a device, which must be the current one: 32 on NVIDIA's, 64 on AMD's gfx942."""
    return 1 if IS_INTERPRETED else int(driver.active.get_current_target().warp_size)


class Config(NamedTuple):
    """How one kernel is compiled and run. A pure function of the call's kind: `choose_config`."""

    num_lanes: int  # elements of a lane: an octet, or a whole Rademacher group
    block: int  # lanes of a block
    num_blocks: int  # blocks of a program
    unroll: int  # terms of one pass of the loop
    num_threads: int  # of a program; at most its lanes, or several threads would compute the same
    tile: int

    def num_warps(self, warp_size: int) -> int:
        """The warps that these threads are on a device."""
        return self.num_threads // warp_size


def choose_config(
    family: str, dtype: torch.dtype, num_by_value: int, num_sides: int, num_tiles: int
) -> Config:
    """The configuration for segments. num_by_value: terms in the arguments, 0 for the loop over terms.

    Four octets a thread in fp32 share the work on keys; fp64 sums and pairs take twice the registers. The
    sums of a Rademacher loop are 128 a thread, so that one Philox call serves 128 elements.
    """
    if IS_INTERPRETED:
        by_group = family == "rademacher" and num_by_value == 0 and dtype != torch.float64
        return Config(RADEMACHER_GROUP if by_group else OCTET, 2 if by_group else 16, 2, 1, 1, 64)
    if num_by_value:
        return Config(OCTET, 512, 8 if num_tiles > FEW_TILES else 1, 1, 128, TILE)
    if family == "rademacher" and dtype != torch.float64:
        return Config(RADEMACHER_GROUP, 128, 1, 1, 128, TILE)
    heavy = dtype == torch.float64 or num_sides == 2
    return Config(OCTET, 256 if heavy else 512, 1, 1, 128, TILE)


def num_sides(family: str, num_by_value: int, pair: bool) -> int:
    """Sums kept for each element. One term mirrors exactly, so do integers; else a pair sums both sides."""
    return 2 if pair and family == "gaussian" and num_by_value != 1 else 1


def residuals_use(is_compensated: bool, writes_residuals: bool) -> str:
    """What the kernels do about residuals: RESIDUALS of `sums.finish`."""
    if not is_compensated:
        return "none"
    return "split" if writes_residuals else "read"


def runs_config() -> Config:
    """The configuration for runs."""
    return Config(OCTET, 16, 1, 1, 1, 64) if IS_INTERPRETED else Config(OCTET, 256, 1, 1, 128, TILE)


class _Upload(NamedTuple):
    """When the tables of a list were copied to a GPU, and on which stream: their memory is that stream's."""

    done: torch.cuda.Event
    stream: torch.cuda.Stream


class _DeviceTables(NamedTuple):
    """The tables of one list with their copies on the device."""

    tables: dict[Kind, KindTables]
    copies: dict[tuple[Kind, str], Tensor]
    upload: _Upload | None  # None on the CPU

    def use_on_current_stream(self, device: torch.device) -> None:
        """Make the copies safe to read in what is launched next, wherever they were made."""
        # (A capture begins when the device is idle, and what replays a graph keeps what the graph reads.)
        if self.upload is None or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(device)
        if stream == self.upload.stream:
            return
        stream.wait_event(self.upload.done)
        for copy in self.copies.values():
            copy.record_stream(stream)  # the list may be dropped while a kernel of this stream reads them


def _tables_of(operands: Operands, device: torch.device) -> _DeviceTables:
    if operands.device_tables is None:
        tables = make_tables(operands, runs_config().tile)
        copies = {
            (kind, name): upload(table.entries, device, "addresses of the tensors")
            for kind, pair in tables.items()
            for name, table in zip(("segments", "runs"), pair, strict=True)
            if table is not None
        }
        uploaded = None
        if device.type != "cpu":
            stream = torch.cuda.current_stream(device)
            uploaded = _Upload(stream.record_event(), stream)
        operands.device_tables = _DeviceTables(tables, copies, uploaded)
    found: _DeviceTables = operands.device_tables
    found.use_on_current_stream(device)
    return found


def seed_axpy(operands: Operands, terms: Terms | DeviceTerms) -> None:
    """Write the primitive's result into `operands.outs` (and `outs_minus`); in place, residuals too.

    At most two launches a dtype, and as many again for those of its tensors that have residuals.
    """
    if not operands.outs.tensors:
        return
    device = operands.device
    in_place = operands.outs is operands.inputs and operands.outs_minus is None
    with on_device(device):
        found = _tables_of(operands, device)
        if isinstance(terms, DeviceTerms):
            terms = placed(terms, device)
        packed: dict[bool, PackedTerms] = {}
        for kind, (segments, runs) in found.tables.items():
            fp64 = kind.dtype == torch.float64
            if fp64 not in packed:
                packed[fp64] = (
                    pack_host_terms(terms, fp64, device)
                    if isinstance(terms, Terms)
                    else pack_device_terms(terms, fp64)
                )
            if in_place and packed[fp64].is_empty and terms.alpha == 1.0:
                continue
            call = _Call(operands, terms, packed[fp64], kind, warp_size(device))
            if segments is not None:
                call.run_segments(segments, found.copies[kind, "segments"])
            if runs is not None:
                call.run_runs(runs, found.copies[kind, "runs"])
        if isinstance(terms, DeviceTerms):
            count_skipped(terms, all_fp64=all(kind.dtype == torch.float64 for kind in found.tables))


class _Call:
    """The arguments that both kernels share, for one kind."""

    def __init__(
        self,
        operands: Operands,
        terms: Terms | DeviceTerms,
        packed: PackedTerms,
        kind: Kind,
        warp_size: int,
    ):
        dtype = kind.dtype
        self._warp_size = warp_size
        self._rows, self._dtype, self._family = operands.rows, dtype, terms.family
        self._packed = packed
        pair = operands.outs_minus is not None
        inputs = operands.inputs
        self._num_source_rows = inputs.tensors[0].shape[0] if inputs and operands.rows is not None else 0
        fp64 = dtype == torch.float64
        self._options = {
            "radius_base": noise.RADIUS_BASE_PATTERN,
            "one_bits": noise.ONE_PATTERN,
            "FAMILY": terms.family,
            "DTYPE": ELEMENT_TYPES[dtype],
            "ARITHMETIC": tl.float64 if fp64 else tl.float32,
            "NUM_TERMS": packed.num_by_value,
            "NUM_SIDES": num_sides(terms.family, packed.num_by_value, pair),
            "HAS_INPUT": operands.inputs is not None,
            "PAIR": pair,
            "STOCHASTIC": terms.rounding == "stochastic" and dtype in (torch.bfloat16, torch.float16),
            "RESIDUALS": residuals_use(kind.is_compensated, operands.writes_residuals),
            "enable_fp_fusion": False,
        }

    def _table_arguments(self, table: Table, copy: Tensor) -> tuple[Any, ...]:
        num_steps = max(table.num_entries - 1, 0).bit_length()
        return copy, table.num_entries, num_steps

    def _records(self, copy: Tensor) -> Tensor:
        """The records; with the terms in the arguments nothing reads them, and any pointer will do."""
        return copy if self._packed.records is None else self._packed.records

    def run_segments(self, table: Table, copy: Tensor) -> None:
        sides = self._options["NUM_SIDES"]
        config = choose_config(self._family, self._dtype, self._packed.num_by_value, sides, table.num_tiles)
        octets = config.block * config.num_blocks * (config.num_lanes // OCTET)
        segments_kernel[(table.num_tiles * (config.tile // octets),)](
            *self._table_arguments(table, copy),
            self._records(copy),
            *self._packed.by_value,
            **self._options,
            NUM_LANES=config.num_lanes,
            BLOCK=config.block,
            NUM_BLOCKS=config.num_blocks,
            UNROLL=config.unroll,
            TILE=config.tile,
            num_warps=config.num_warps(self._warp_size),
        )

    def run_runs(self, table: Table, copy: Tensor) -> None:
        config = runs_config()
        runs_kernel[(table.num_tiles * (config.tile // config.block),)](
            *self._table_arguments(table, copy),
            copy if self._rows is None else self._rows,
            self._num_source_rows,
            self._records(copy),
            *self._packed.by_value,
            **self._options,
            HAS_ROWS=self._rows is not None,
            BLOCK=config.block,
            TILE=config.tile,
            num_warps=config.num_warps(self._warp_size),
        )
