"""Launches of the Triton kernels for checked operands and terms, on torch's current stream.

Only tensors of the caller are written, and nothing waits for the device. What is allocated: the tables of a
list (once for a prepared one) and, for three terms or more, the terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    ALIGNMENT,
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


class Variant(NamedTuple):
    """All that decides what Triton compiles for a launch, on one device."""

    is_runs: bool  # runs_kernel; else segments_kernel
    family: str
    dtype: torch.dtype
    num_by_value: int
    has_input: bool
    pair: bool
    stochastic: bool
    residuals: str
    has_rows: bool = False
    rows_are_aligned: bool = True
    many_tiles: bool = False

    @property
    def num_sides(self) -> int:
        """Sums kept for each element."""
        return num_sides(self.family, self.num_by_value, self.pair)

    def config(self) -> Config:
        """How it is run."""
        if self.is_runs:
            return runs_config()
        num_tiles = FEW_TILES + 1 if self.many_tiles else 1
        return choose_config(self.family, self.dtype, self.num_by_value, self.num_sides, num_tiles)

    def options(self, warp_size: int) -> dict[str, Any]:
        """The arguments of the kernel that are the same for all its launches."""
        config, fp64 = self.config(), self.dtype == torch.float64
        options: dict[str, Any] = {
            "radius_base": noise.RADIUS_BASE_PATTERN,
            "one_bits": noise.ONE_PATTERN,
            "FAMILY": self.family,
            "DTYPE": ELEMENT_TYPES[self.dtype],
            "ARITHMETIC": tl.float64 if fp64 else tl.float32,
            "NUM_TERMS": self.num_by_value,
            "NUM_SIDES": self.num_sides,
            "HAS_INPUT": self.has_input,
            "PAIR": self.pair,
            "STOCHASTIC": self.stochastic,
            "RESIDUALS": self.residuals,
            "enable_fp_fusion": False,
            "BLOCK": config.block,
            "TILE": config.tile,
            "num_warps": config.num_warps(warp_size),
        }
        if self.is_runs:
            return options | {"HAS_ROWS": self.has_rows}
        return options | {
            "NUM_LANES": config.num_lanes,
            "NUM_BLOCKS": config.num_blocks,
            "UNROLL": config.unroll,
        }


class Launch(NamedTuple):
    """A launch that is ready."""

    variant: Variant
    num_programs: int
    arguments: tuple[Any, ...]

    @property
    def kernel(self) -> Any:
        return runs_kernel if self.variant.is_runs else segments_kernel

    def run(self, warp_size: int) -> None:
        """Launch it on the current stream."""
        self.kernel[(self.num_programs,)](*self.arguments, **self.variant.options(warp_size))


def seed_axpy(
    operands: Operands,
    terms: Terms | DeviceTerms,
    before: Callable[[list[Launch], torch.device], None] | None = None,
) -> None:
    """Write the primitive's result into `operands.outs` (and `outs_minus`); in place, residuals too.

    At most two launches a dtype, and as many again for those of its tensors that have residuals.

    Args:
        before: called with all launches of the call before the first of them.
    """
    if not operands.outs.tensors:
        return
    device = operands.device
    with on_device(device):
        if isinstance(terms, DeviceTerms):
            terms = placed(terms, device)
        launches = ready_launches(operands, terms)
        if before is not None:
            before(launches, device)
        for launch in launches:
            launch.run(warp_size(device))
        if isinstance(terms, DeviceTerms):
            kinds = _tables_of(operands, device).tables
            count_skipped(terms, all_fp64=all(kind.dtype == torch.float64 for kind in kinds))


def ready_launches(
    operands: Operands, terms: Terms | DeviceTerms, many_tiles: bool | None = None
) -> list[Launch]:
    """The launches of a call on its device, which must be the current one.

    many_tiles: whether lists count as long, whatever they are; None: by their length.
    """
    device = operands.device
    in_place = operands.outs is operands.inputs and operands.outs_minus is None
    inputs, rows = operands.inputs, operands.rows
    num_source_rows = inputs.tensors[0].shape[0] if inputs and rows is not None else 0
    found = _tables_of(operands, device)
    packed: dict[bool, PackedTerms] = {}
    launches = []
    for kind, tables in found.tables.items():
        fp64 = kind.dtype == torch.float64
        if fp64 not in packed:
            packed[fp64] = (
                pack_host_terms(terms, fp64, device)
                if isinstance(terms, Terms)
                else pack_device_terms(terms, fp64)
            )
        if in_place and packed[fp64].is_empty and terms.alpha == 1.0:
            continue
        for name, table in zip(("segments", "runs"), tables, strict=True):
            if table is None:
                continue
            is_runs, num_by_value = name == "runs", packed[fp64].num_by_value
            is_long = table.num_tiles > FEW_TILES if many_tiles is None else many_tiles
            variant = Variant(
                is_runs=is_runs,
                family=terms.family,
                dtype=kind.dtype,
                num_by_value=num_by_value,
                has_input=inputs is not None,
                pair=operands.outs_minus is not None,
                stochastic=terms.rounding == "stochastic" and kind.dtype in (torch.bfloat16, torch.float16),
                residuals=residuals_use(kind.is_compensated, operands.writes_residuals),
                has_rows=rows is not None,
                rows_are_aligned=rows is None or rows.data_ptr() % ALIGNMENT == 0,
                many_tiles=not is_runs and num_by_value > 0 and is_long,
            )
            launches.append(
                _launch(variant, table, found.copies[kind, name], packed[fp64], rows, num_source_rows)
            )
    return launches


def _launch(
    variant: Variant,
    table: Table,
    copy: Tensor,
    packed: PackedTerms,
    rows: Tensor | None,
    num_source_rows: int,
) -> Launch:
    """The launch of a table, `copy` on the device."""
    config = variant.config()
    octets = config.block * config.num_blocks * (config.num_lanes // OCTET)
    num_steps = max(table.num_entries - 1, 0).bit_length()
    # With the terms in the arguments nothing reads the records, nor rows where there are none: any pointer
    # will do.
    records = copy if packed.records is None else packed.records
    gathered = (copy if rows is None else rows, num_source_rows) if variant.is_runs else ()
    arguments = (copy, table.num_entries, num_steps, *gathered, records, *packed.by_value)
    return Launch(variant, table.num_tiles * (config.tile // octets), arguments)
