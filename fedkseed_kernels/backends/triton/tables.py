"""The tables that the Triton kernels read, made from checked operands: segments and runs.

Plain NumPy on the host; nothing here needs Triton or a GPU. One table of each kind for each dtype, so that a
list of any length is one launch a dtype, and a second one where something is not whole and aligned. (A launch
from Python costs more than the work of a small tensor; a list of 300 would be launch-bound.) Tensors with
residuals have tables of their own: the kernels of the others do not know that there is such a thing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed_kernels.contract import reference
from fedkseed_kernels.layout import collapsed_layout, strided_positions
from fedkseed_kernels.operands import MAX_DIMS, Operands

# Elements that share one Philox call.
OCTET = 1 << reference.GAUSSIAN_GROUP_BITS
RADEMACHER_GROUP = 1 << reference.RADEMACHER_GROUP_BITS
OCTETS_PER_GROUP = RADEMACHER_GROUP // OCTET
# Bytes of the widest access; a segment's memory starts at a multiple of it.
ALIGNMENT = 16
# Segments never cross a multiple of this many octets, so that the counter's high word is one for a segment.
OCTETS_PER_HIGH_WORD = 1 << 32

# Rows of a segment table, int64 [len(SEGMENT_FIELDS), num_segments]. Output element i of a segment has
# element index 8 first_octet + i.
SEGMENT_FIELDS = (
    "first_tile",
    "source",
    "target",
    "target_minus",
    "num_octets",
    "first_octet",
    "stream",
    "residual",
)

# Columns of a run table, int64 [num_entries, RUN_WIDTH]: RUN_FIELDS, then each of RUN_DIMS for RUN_MAX_OUTER
# outer dimensions. A run is a row of run_length elements with consecutive element indices; its coordinates
# are those of the outer dimensions. Residuals have the strides of the source.
RUN_FIELDS = (
    "first_tile",
    "source",
    "target",
    "target_minus",
    "num_runs",
    "run_length",
    "octets_per_run",
    "first_element",
    "stream",
    "source_stride",
    "target_stride",
    "target_minus_stride",
    "num_outer",
    "residual",
)
RUN_DIMS = ("sizes", "source_strides", "target_strides", "target_minus_strides", "element_strides")
RUN_MAX_OUTER = MAX_DIMS
RUN_WIDTH = len(RUN_FIELDS) + len(RUN_DIMS) * RUN_MAX_OUTER


class Table(NamedTuple):
    """One launch: its entries and how many tiles of octets they take."""

    entries: NDArray[np.int64]
    num_entries: int
    num_tiles: int


class Kind(NamedTuple):
    """What decides which kernels serve a tensor: its dtype, and whether it has a residual."""

    dtype: torch.dtype
    is_compensated: bool


class KindTables(NamedTuple):
    """What the tensors of one kind come to; None for a table without entries."""

    segments: Table | None
    runs: Table | None


class Addresses(NamedTuple):
    """Where a tensor lies; 0 where there is no such memory."""

    source: int
    target: int
    target_minus: int
    residual: int

    def after(self, num_bytes: int) -> Addresses:
        """The same num_bytes further on."""
        return Addresses(*(address + num_bytes if address else 0 for address in self))


class _Run(NamedTuple):
    """One entry of a run table, before its tile is known."""

    addresses: Addresses
    first_element: int
    stream: int
    run_length: int
    inner_strides: tuple[int, int, int]  # of source, target, target_minus
    sizes: list[int]
    strides: list[list[int]]  # in the order of RUN_DIMS[1:]

    @property
    def num_runs(self) -> int:
        return int(np.prod(self.sizes, dtype=np.int64))

    @property
    def octets_per_run(self) -> int:
        *_, element_strides = self.strides
        starts_on_octets = self.first_element % OCTET == 0 and all(s % OCTET == 0 for s in element_strides)
        return (self.run_length + (OCTET - 1 if starts_on_octets else 2 * (OCTET - 1))) // OCTET


class _Segment(NamedTuple):
    addresses: Addresses
    num_octets: int
    first_octet: int
    stream: int


def _flat_run(addresses: Addresses, first_element: int, stream: int, numel: int) -> _Run:
    return _Run(addresses, first_element, stream, numel, (1, 1, 1), [], [[], [], [], []])


def split_flat(
    addresses: Addresses, first_element: int, stream: int, numel: int, itemsize: int
) -> tuple[list[_Segment], list[_Run]]:
    """A tensor whose memory and element indices run together: aligned whole octets, and the rest.

    Args:
        first_element: element index of its first element.
        numel, itemsize: elements, and bytes of each.
    """
    head = min(-first_element % OCTET, numel)
    num_octets = (numel - head) // OCTET
    body = addresses.after(head * itemsize)
    if num_octets == 0 or any(address % ALIGNMENT for address in body):
        return [], [_flat_run(addresses, first_element, stream, numel)]
    runs = [_flat_run(addresses, first_element, stream, head)] if head else []
    segments = []
    done = 0
    first_octet = (first_element + head) // OCTET
    while done < num_octets:
        room = OCTETS_PER_HIGH_WORD - (first_octet + done) % OCTETS_PER_HIGH_WORD
        take = min(num_octets - done, room)
        segments.append(_Segment(body.after(done * OCTET * itemsize), take, first_octet + done, stream))
        done += take
    tail = numel - head - num_octets * OCTET
    if tail:
        end = head + num_octets * OCTET
        runs.append(_flat_run(addresses.after(end * itemsize), first_element + end, stream, tail))
    return segments, runs


def _strided_run(operands: Operands, position: int, addresses: Addresses, stream: int) -> _Run | None:
    """The run table's entry of a tensor, None if it is flat after all."""
    first_element, sizes, strides = collapsed_layout(operands, position)
    gathers = operands.rows is not None
    if not gathers and len(sizes) <= 1 and all(s in ([], [1]) for s in strides):
        return None
    # Dimension 0 of a gather is looked up, so it is no run.
    source, target, target_minus, element = strides
    has_inner = len(sizes) > gathers and element[-1] == 1
    if not has_inner:
        return _Run(addresses, first_element, stream, 1, (0, 0, 0), sizes, strides)
    inner = (source[-1], target[-1], target_minus[-1])
    return _Run(addresses, first_element, stream, sizes[-1], inner, sizes[:-1], [s[:-1] for s in strides])


def _segment_table(segments: list[_Segment], tile: int) -> Table | None:
    if not segments:
        return None
    num_octets = np.array([s.num_octets for s in segments], dtype=np.int64)
    first_octets = np.array([s.first_octet for s in segments], dtype=np.int64)
    # A program that sums by Rademacher groups starts at a whole one, maybe before the segment's first octet.
    tiles = -(-(num_octets + first_octets % OCTETS_PER_GROUP) // tile)
    fields = {
        "first_tile": np.cumsum(tiles) - tiles,
        "source": [s.addresses.source for s in segments],
        "target": [s.addresses.target for s in segments],
        "target_minus": [s.addresses.target_minus for s in segments],
        "num_octets": num_octets,
        "first_octet": first_octets,
        "stream": [s.stream for s in segments],
        "residual": [s.addresses.residual for s in segments],
    }
    entries = np.array([fields[name] for name in SEGMENT_FIELDS], dtype=np.int64)
    return Table(entries, len(segments), int(tiles.sum()))


def _run_table(runs: list[_Run], tile: int) -> Table | None:
    if not runs:
        return None
    entries = np.zeros((len(runs), RUN_WIDTH), dtype=np.int64)
    num_tiles = 0
    for entry, run in zip(entries, runs, strict=True):
        source_stride, target_stride, target_minus_stride = run.inner_strides
        fields = {
            "first_tile": num_tiles,
            **run.addresses._asdict(),
            "num_runs": run.num_runs,
            "run_length": run.run_length,
            "octets_per_run": run.octets_per_run,
            "first_element": run.first_element,
            "stream": run.stream,
            "source_stride": source_stride,
            "target_stride": target_stride,
            "target_minus_stride": target_minus_stride,
            "num_outer": len(run.sizes),
        }
        entry[: len(RUN_FIELDS)] = [fields[name] for name in RUN_FIELDS]
        dims = entry[len(RUN_FIELDS) :].reshape(len(RUN_DIMS), RUN_MAX_OUTER)
        for row, values in zip(dims, (run.sizes, *run.strides), strict=True):
            row[: len(values)] = values
        num_tiles += -(-run.num_runs * run.octets_per_run // tile)
    return Table(entries, len(runs), num_tiles)


def make_tables(operands: Operands, tile: int) -> dict[Kind, KindTables]:
    """The tables of a list, by kind; tile is the number of octets that an entry's tiles count in.

    Raises:
        ValueError: a tensor has more than MAX_DIMS dimensions after merging.
    """
    outs = operands.outs
    residuals = operands.residuals or [None] * len(outs.tensors)
    kinds = [
        Kind(dtype, residual is not None) for dtype, residual in zip(outs.dtypes, residuals, strict=True)
    ]
    segments: dict[Kind, list[_Segment]] = {kind: [] for kind in kinds}
    runs: dict[Kind, list[_Run]] = {kind: [] for kind in kinds}
    strided = set(strided_positions(operands))
    for i, (kind, numel, stream) in enumerate(zip(kinds, outs.numels, operands.streams, strict=True)):
        if numel == 0:
            continue
        residual = residuals[i]
        addresses = Addresses(
            0 if operands.inputs is None else operands.inputs.addresses[i],
            outs.addresses[i],
            0 if operands.outs_minus is None else operands.outs_minus.addresses[i],
            0 if residual is None else residual.data_ptr(),
        )
        run = _strided_run(operands, i, addresses, stream) if i in strided else None
        if run is not None:
            runs[kind].append(run)
            continue
        first_element = collapsed_layout(operands, i)[0] if i in strided else operands.offsets[i]
        whole, rest = split_flat(addresses, first_element, stream, numel, kind.dtype.itemsize)
        segments[kind] += whole
        runs[kind] += rest
    return {
        kind: KindTables(_segment_table(segments[kind], tile), _run_table(runs[kind], tile))
        for kind in segments
    }
