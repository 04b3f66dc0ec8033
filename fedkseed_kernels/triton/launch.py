"""From checked operands and terms to launches of the Triton kernels, on torch's current stream.

Only tensors of the caller are written, and nothing waits for the device. What is allocated: the tables of a
list (once for a prepared one) and, for three terms or more, the terms.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.jit import JITFunction

from fedkseed_kernels._exact import ieee_arithmetic
from fedkseed_kernels._operands import Operands, Terms
from fedkseed_kernels.triton import noise
from fedkseed_kernels.triton.interpreter import exact_arithmetic
from fedkseed_kernels.triton.seed_axpy import runs_kernel, segments_kernel
from fedkseed_kernels.triton.tables import OCTET, DtypeTables, Table, make_tables

#: True when TRITON_INTERPRET=1 was set before Triton was imported: the kernels then run on the CPU.
IS_INTERPRETED = not isinstance(segments_kernel, JITFunction)

ELEMENT_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
# Terms up to this number travel as kernel arguments, through kernels without a loop over terms.
MAX_TERMS_BY_VALUE = 2
# Words of 32 bits that a term takes in device memory: key, key, coefficient (two for fp64).
RECORD_WORDS = 4
RADEMACHER_GROUP = 128
_NOTHING_BY_VALUE = (0, 0, 0, 0, 1.0, 0)
# Octets that the tables count in.
TILE = 4096
# Below this many tiles a program takes one block instead of a tile, so that small lists fill a GPU too.
FEW_TILES = 1024


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where launches go within a block: Triton takes torch's current device, or its own interpreter."""
    return exact_arithmetic() if IS_INTERPRETED else torch.cuda.device(device)


class Config(NamedTuple):
    """How one kernel is compiled and run. A pure function of the call's kind: `choose_config`."""

    num_lanes: int  # elements of a lane: an octet, or a whole Rademacher group
    block: int  # lanes of a block
    num_blocks: int  # blocks of a program
    unroll: int  # terms of one pass of the loop
    num_warps: int
    tile: int


def choose_config(
    family: str, dtype: torch.dtype, num_by_value: int, num_sides: int, num_tiles: int
) -> Config:
    """The configuration for segments. num_by_value: terms in the arguments, 0 for the loop over terms.

    Four octets a thread in fp32 share the work on keys; fp64 sums and pairs take twice the registers. The
    sums of a Rademacher loop are 128 a thread, so that one Philox call serves 128 elements.
    """
    if IS_INTERPRETED:
        wide = family == "rademacher" and num_by_value == 0
        return Config(RADEMACHER_GROUP if wide else OCTET, 2 if wide else 16, 2, 1, 1, 64)
    if num_by_value:
        return Config(OCTET, 512, 8 if num_tiles > FEW_TILES else 1, 1, 4, TILE)
    heavy = dtype == torch.float64 or num_sides == 2
    if family == "rademacher" and not heavy:
        return Config(RADEMACHER_GROUP, 128, 1, 2, 4, TILE)
    return Config(OCTET, 256 if heavy else 512, 1, 1, 4, TILE)


def runs_config() -> Config:
    """The configuration for runs."""
    return Config(OCTET, 16, 1, 1, 1, 64) if IS_INTERPRETED else Config(OCTET, 256, 1, 1, 4, TILE)


class PackedTerms(NamedTuple):
    """The terms of one arithmetic format as the kernels take them.

    Up to MAX_TERMS_BY_VALUE on the host: seeds and the fp64 patterns of coefficients, alpha, rounding seed.
    More, or on the device: records of RECORD_WORDS int32; in the first the number of terms, alpha and
    rounding seed.
    """

    num_by_value: int
    by_value: tuple[int | float, ...]
    records: Tensor | None
    is_empty: bool  # surely no term is left; False also when only the device knows


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


def pack_host_terms(terms: Terms, fp64: bool, device: torch.device) -> PackedTerms:
    """Round the coefficients to fp32 (or not: fp64), drop zeros, and choose how the terms travel."""
    with ieee_arithmetic():
        coefficients: NDArray[Any] = terms.coeffs.astype(np.float64 if fp64 else np.float32)
    left = np.flatnonzero(coefficients != 0)
    seeds, coefficients = terms.seeds[left], coefficients[left]
    if 0 < left.size <= MAX_TERMS_BY_VALUE:
        patterns = coefficients.astype(np.float64).view(np.uint64)
        values = [_signed(int(x)) for pair in zip(seeds, patterns, strict=True) for x in pair]
        values += [0] * (2 * MAX_TERMS_BY_VALUE - len(values))
        return PackedTerms(left.size, (*values, terms.alpha, _signed(terms.rounding_seed)), None, False)
    records = np.zeros((left.size + 1, RECORD_WORDS), dtype=np.int32)
    records[0, 0] = left.size
    records[0, 1:2] = np.array([terms.alpha], dtype=np.float32).view(np.int32)
    records[0, 2:] = np.array([terms.rounding_seed], dtype=np.uint64).view(np.int32)
    records[1:, :2] = seeds.view(np.int32).reshape(-1, 2)
    words = coefficients.view(np.int32).reshape(left.size, 2 if fp64 else 1)
    records[1:, 2 : 2 + words.shape[1]] = words
    return PackedTerms(0, _NOTHING_BY_VALUE, _upload(records, device, "terms"), left.size == 0)


def pack_device_terms(terms: Any, fp64: bool) -> PackedTerms:
    """The same for terms in device memory, there: nothing waits, and a captured graph does it at each replay.

    terms: seeds int64 [K], coeffs fp64 [K]; alpha and rounding_seed numbers, or tensors of one element.
    A NaN or infinite coefficient is dropped like a zero.
    """
    coefficients = terms.coeffs if fp64 else terms.coeffs.to(torch.float32)
    num_terms = coefficients.numel()
    is_left = torch.isfinite(coefficients) & (coefficients != 0)
    # In order behind the header; dropped ones share a last record that is never read.
    place = torch.where(is_left, torch.cumsum(is_left, 0), num_terms + 1)
    found = torch.zeros((num_terms, RECORD_WORDS), dtype=torch.int32, device=coefficients.device)
    found[:, :2] = terms.seeds.reshape(num_terms, 1).contiguous().view(torch.int32)
    words = coefficients.reshape(num_terms, 1).contiguous().view(torch.int32)
    found[:, 2 : 2 + words.shape[1]] = words
    records = torch.zeros((num_terms + 2, RECORD_WORDS), dtype=torch.int32, device=coefficients.device)
    records[place] = found
    records[0, 0] = is_left.sum()
    _put(records[0, 1:2], terms.alpha, torch.float32)
    _put(records[0, 2:], terms.rounding_seed, torch.int64)
    return PackedTerms(0, _NOTHING_BY_VALUE, records, False)


def _put(words: Tensor, value: float | Tensor, dtype: torch.dtype) -> None:
    """Write a number in a dtype's pattern into int32 words; one from the host without a copy."""
    target = words.view(dtype)
    if isinstance(value, Tensor):
        target.copy_(value.reshape(1))
    else:
        target.fill_(_signed(value) if isinstance(value, int) else value)


def count_skipped(terms: Any, all_fp64: bool) -> None:
    """Raise terms.num_skipped, if there is one, by the number of coefficients that are NaN or infinite."""
    if terms.num_skipped is not None:
        coefficients = terms.coeffs if all_fp64 else terms.coeffs.to(torch.float32)
        terms.num_skipped += (~torch.isfinite(coefficients)).sum().to(torch.int32)


def _upload(array: NDArray[Any], device: torch.device, what: str) -> Tensor:
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"expected no copy from the host while a CUDA graph is captured, but the {what} are on the host; "
            "use a prepared list that has run once, and at most two terms"
        )
    return host.pin_memory().to(device, non_blocking=True)


class _DeviceTables(NamedTuple):
    """The tables of one list with their copies on the device."""

    tables: dict[torch.dtype, DtypeTables]
    copies: dict[tuple[torch.dtype, str], Tensor]
    copied: torch.cuda.Event | None  # None on the CPU


def _tables_of(operands: Operands, device: torch.device) -> _DeviceTables:
    if operands.device_tables is None:
        tables = make_tables(operands, runs_config().tile)
        copies = {
            (dtype, kind): _upload(table.entries, device, "addresses of the tensors")
            for dtype, pair in tables.items()
            for kind, table in zip(("segments", "runs"), pair, strict=True)
            if table is not None
        }
        copied = None
        if device.type != "cpu":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        operands.device_tables = _DeviceTables(tables, copies, copied)
    found: _DeviceTables = operands.device_tables
    # A prepared list may be used on another stream than the one that its tables were copied on. (A capture
    # begins when the device is idle.)
    if found.copied is not None and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).wait_event(found.copied)
    return found


def seed_axpy(operands: Operands, terms: Any) -> None:
    """Write the primitive's result into `operands.outs` (and `outs_minus`); at most two launches a dtype.

    terms: Terms, or terms in device memory with the fields that `pack_device_terms` and `count_skipped` name.
    """
    if not operands.outs.tensors:
        return
    device = operands.outs.tensors[0].device
    on_host = isinstance(terms, Terms)
    in_place = operands.outs is operands.inputs and operands.outs_minus is None
    with on_device(device):
        found = _tables_of(operands, device)
        packed: dict[bool, PackedTerms] = {}
        for dtype, (segments, runs) in found.tables.items():
            fp64 = dtype == torch.float64
            if fp64 not in packed:
                packed[fp64] = (
                    pack_host_terms(terms, fp64, device) if on_host else pack_device_terms(terms, fp64)
                )
            if in_place and packed[fp64].is_empty and terms.alpha == 1.0:
                continue
            call = _Call(operands, terms, packed[fp64], dtype)
            if segments is not None:
                call.run_segments(segments, found.copies[dtype, "segments"])
            if runs is not None:
                call.run_runs(runs, found.copies[dtype, "runs"])
        if not on_host:
            count_skipped(terms, all_fp64=found.tables.keys() <= {torch.float64})


class _Call:
    """The arguments that both kernels share, for one dtype."""

    def __init__(self, operands: Operands, terms: Any, packed: PackedTerms, dtype: torch.dtype):
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
            # A single term mirrors exactly; more are summed for both sides.
            "NUM_SIDES": 2 if pair and packed.num_by_value != 1 else 1,
            "HAS_INPUT": operands.inputs is not None,
            "PAIR": pair,
            "STOCHASTIC": terms.rounding == "stochastic" and dtype in (torch.bfloat16, torch.float16),
            "enable_fp_fusion": False,
        }

    def _table_arguments(self, table: Table, copy: Tensor) -> tuple[Any, ...]:
        num_steps = max(table.num_entries - 1, 0).bit_length()
        return copy, table.num_entries, num_steps

    def _records(self, copy: Tensor) -> Tensor:
        """The records; with the terms in the arguments nothing reads them, and any pointer will do."""
        return copy if self._packed.records is None else self._packed.records

    def run_segments(self, table: Table, copy: Tensor) -> None:
        num_sides = self._options["NUM_SIDES"]
        config = choose_config(
            self._family, self._dtype, self._packed.num_by_value, num_sides, table.num_tiles
        )
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
            num_warps=config.num_warps,
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
            num_warps=config.num_warps,
        )
