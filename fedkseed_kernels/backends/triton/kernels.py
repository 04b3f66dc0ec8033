"""The primitive in Triton (docs/noise-contract.md section 6): two kernels over a table of tensors.

A program works on blocks of octets, eight elements that share a Gaussian group. Each octet belongs to one
lane, whose sums stay in registers over the whole loop over terms and are joined after it.

* `segments_kernel`: memory and element indices run together and octets are whole and aligned: nearly all
  weights of a model.
* `runs_kernel`: anything else: odd ends, strides, views, gathered rows.

`launch` picks the parameters and says what the arguments mean, `tables` what the fields of the tables mean.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedkseed_kernels.backends.triton.noise import key_of, rounding_octet
from fedkseed_kernels.backends.triton.sums import accumulate, finish, octet_values, read_header
from fedkseed_kernels.backends.triton.tables import (
    RUN_DIMS,
    RUN_FIELDS,
    RUN_MAX_OUTER,
    RUN_WIDTH,
    SEGMENT_FIELDS,
)

# Fields of a segment: each a row of its table.
SEGMENT_FIRST_TILE = tl.constexpr(SEGMENT_FIELDS.index("first_tile"))
SEGMENT_SOURCE = tl.constexpr(SEGMENT_FIELDS.index("source"))
SEGMENT_TARGET = tl.constexpr(SEGMENT_FIELDS.index("target"))
SEGMENT_TARGET_MINUS = tl.constexpr(SEGMENT_FIELDS.index("target_minus"))
SEGMENT_NUM_OCTETS = tl.constexpr(SEGMENT_FIELDS.index("num_octets"))
SEGMENT_FIRST_OCTET = tl.constexpr(SEGMENT_FIELDS.index("first_octet"))
SEGMENT_STREAM = tl.constexpr(SEGMENT_FIELDS.index("stream"))
SEGMENT_RESIDUAL = tl.constexpr(SEGMENT_FIELDS.index("residual"))

# Fields of a run: each a column of its table.
NUM_RUN_COLUMNS = tl.constexpr(RUN_WIDTH)
RUN_FIRST_TILE = tl.constexpr(RUN_FIELDS.index("first_tile"))
RUN_SOURCE = tl.constexpr(RUN_FIELDS.index("source"))
RUN_TARGET = tl.constexpr(RUN_FIELDS.index("target"))
RUN_TARGET_MINUS = tl.constexpr(RUN_FIELDS.index("target_minus"))
RUN_NUM_RUNS = tl.constexpr(RUN_FIELDS.index("num_runs"))
RUN_LENGTH = tl.constexpr(RUN_FIELDS.index("run_length"))
RUN_NUM_OCTETS = tl.constexpr(RUN_FIELDS.index("octets_per_run"))
RUN_FIRST_ELEMENT = tl.constexpr(RUN_FIELDS.index("first_element"))
RUN_STREAM = tl.constexpr(RUN_FIELDS.index("stream"))
RUN_SOURCE_STRIDE = tl.constexpr(RUN_FIELDS.index("source_stride"))
RUN_TARGET_STRIDE = tl.constexpr(RUN_FIELDS.index("target_stride"))
RUN_TARGET_MINUS_STRIDE = tl.constexpr(RUN_FIELDS.index("target_minus_stride"))
RUN_NUM_OUTER = tl.constexpr(RUN_FIELDS.index("num_outer"))
RUN_RESIDUAL = tl.constexpr(RUN_FIELDS.index("residual"))


def _first_column(dims: str) -> tl.constexpr:
    """The column of outer dimension 0 in one of `tables.RUN_DIMS`."""
    return tl.constexpr(len(RUN_FIELDS) + RUN_DIMS.index(dims) * RUN_MAX_OUTER)


OUTER_SIZES = _first_column("sizes")
OUTER_SOURCE_STRIDES = _first_column("source_strides")
OUTER_TARGET_STRIDES = _first_column("target_strides")
OUTER_TARGET_MINUS_STRIDES = _first_column("target_minus_strides")
OUTER_ELEMENT_STRIDES = _first_column("element_strides")

# Arguments whose value must not lead to another compilation.
_RUN_TIME = (
    "num_entries",
    "num_steps",
    "num_source_rows",
    "seed_0",
    "coeff_bits_0",
    "seed_1",
    "coeff_bits_1",
    "alpha",
    "rounding_seed",
    "radius_base",
    "one_bits",
)


@triton.jit
def _find_entry(first_tiles, stride: tl.constexpr, num_entries, num_steps, tile):
    """The last entry whose first tile is at most tile; num_steps halvings suffice for num_entries."""
    low = 0
    high = num_entries
    for _ in range(num_steps):
        middle = (low + high) // 2
        is_before = tl.load(first_tiles + middle * stride) <= tile
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit(do_not_specialize=_RUN_TIME)
def segments_kernel(
    table,
    num_entries,
    num_steps,
    terms,
    seed_0: tl.int64,
    coeff_bits_0: tl.int64,
    seed_1: tl.int64,
    coeff_bits_1: tl.int64,
    alpha: tl.float32,
    rounding_seed: tl.int64,
    radius_base: tl.int32,
    one_bits: tl.int32,
    FAMILY: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    NUM_LANES: tl.constexpr,
    NUM_SIDES: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    PAIR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RESIDUALS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
):
    """The primitive over aligned whole octets. One program: NUM_BLOCKS blocks of BLOCK lanes of a segment."""
    OCTETS: tl.constexpr = NUM_LANES // 8
    PROGRAMS: tl.constexpr = TILE // (BLOCK * NUM_BLOCKS * OCTETS)
    num_terms = NUM_TERMS
    if NUM_TERMS == 0:
        num_terms, alpha, rounding_seed = read_header(terms)
    scale = tl.full((1, 1), alpha, tl.float32)
    tile = tl.program_id(0) // PROGRAMS
    part = tl.program_id(0) % PROGRAMS
    first_tiles = table + SEGMENT_FIRST_TILE * num_entries
    entry = table + _find_entry(first_tiles, 1, num_entries, num_steps, tile)
    source = tl.load(entry + SEGMENT_SOURCE * num_entries).to(tl.pointer_type(DTYPE))
    target = tl.load(entry + SEGMENT_TARGET * num_entries).to(tl.pointer_type(DTYPE))
    target_minus = tl.load(entry + SEGMENT_TARGET_MINUS * num_entries).to(tl.pointer_type(DTYPE))
    residual = source  # never read
    if RESIDUALS != "none":
        residual = tl.load(entry + SEGMENT_RESIDUAL * num_entries).to(tl.pointer_type(tl.int16))
    num_octets = tl.load(entry + SEGMENT_NUM_OCTETS * num_entries)
    first_octet = tl.load(entry + SEGMENT_FIRST_OCTET * num_entries)
    stream = tl.load(entry + SEGMENT_STREAM * num_entries).to(tl.uint32)

    high = (first_octet >> 32).to(tl.uint32)
    # Relative to the segment, at a whole group: negative where the first group begins before the segment.
    first_group = -(first_octet % OCTETS)
    program = (tile - tl.load(entry + SEGMENT_FIRST_TILE * num_entries)) * PROGRAMS + part
    start = first_group + program * (BLOCK * NUM_BLOCKS * OCTETS)
    lane = tl.arange(0, BLOCK)
    column = tl.arange(0, 8)[None, :]
    for block in range(NUM_BLOCKS):
        begin = start + block * (BLOCK * OCTETS)
        end = tl.minimum(num_octets - begin, BLOCK * OCTETS).to(tl.int32)
        if end > 0:
            octet = (first_octet + begin).to(tl.uint32) + (lane * OCTETS).to(tl.uint32)
            if NUM_LANES == 8:
                low = octet
                high_word = high
            else:
                low = (octet >> 4) | (high << 28)
                high_word = high >> 4
            acc = accumulate(
                low=low,
                high=high_word,
                stream=stream,
                terms=terms,
                num_terms=num_terms,
                seed_0=seed_0,
                coeff_bits_0=coeff_bits_0,
                seed_1=seed_1,
                coeff_bits_1=coeff_bits_1,
                radius_base=radius_base,
                one_bits=one_bits,
                ARITHMETIC=ARITHMETIC,
                FAMILY=FAMILY,
                NUM_TERMS=NUM_TERMS,
                NUM_LANES=NUM_LANES,
                NUM_SIDES=NUM_SIDES,
                UNROLL=UNROLL,
            )
            for i in tl.static_range(OCTETS):
                position = lane * OCTETS + i
                mask = (position < end)[:, None]
                if OCTETS > 1:
                    mask = mask & (position >= -begin)[:, None]
                offset = (lane * (OCTETS * 8))[:, None] + (i * 8 + column)
                random_bits = 0
                if STOCHASTIC:
                    k0, k1 = key_of(rounding_seed)
                    random_bits = octet_values(rounding_octet(octet + i, high, stream, k0, k1), 0)
                finish(
                    source=tl.multiple_of(source + begin * 8, 16) + offset,
                    target=tl.multiple_of(target + begin * 8, 16) + offset,
                    target_minus=tl.multiple_of(target_minus + begin * 8, 16) + offset,
                    residual=tl.multiple_of(residual + begin * 8, 16) + offset,
                    mask=mask,
                    acc=acc,
                    terms=terms,
                    num_terms=num_terms,
                    scale=scale,
                    random_bits=random_bits,
                    FIRST=i * 8,
                    ARITHMETIC=ARITHMETIC,
                    DTYPE=DTYPE,
                    FAMILY=FAMILY,
                    NUM_TERMS=NUM_TERMS,
                    NUM_LANES=NUM_LANES,
                    NUM_SIDES=NUM_SIDES,
                    HAS_INPUT=HAS_INPUT,
                    PAIR=PAIR,
                    STOCHASTIC=STOCHASTIC,
                    RESIDUALS=RESIDUALS,
                )


@triton.jit(do_not_specialize=_RUN_TIME)
def runs_kernel(
    table,
    num_entries,
    num_steps,
    rows,
    num_source_rows,
    terms,
    seed_0: tl.int64,
    coeff_bits_0: tl.int64,
    seed_1: tl.int64,
    coeff_bits_1: tl.int64,
    alpha: tl.float32,
    rounding_seed: tl.int64,
    radius_base: tl.int32,
    one_bits: tl.int32,
    FAMILY: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    NUM_SIDES: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PAIR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RESIDUALS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The primitive over runs in any memory. One program: BLOCK octets, of as many runs as that takes."""
    PROGRAMS: tl.constexpr = TILE // BLOCK
    num_terms = NUM_TERMS
    if NUM_TERMS == 0:
        num_terms, alpha, rounding_seed = read_header(terms)
    scale = tl.full((1, 1), alpha, tl.float32)
    tile = tl.program_id(0) // PROGRAMS
    part = tl.program_id(0) % PROGRAMS
    first_tiles = table + RUN_FIRST_TILE
    entry = table + _find_entry(first_tiles, NUM_RUN_COLUMNS, num_entries, num_steps, tile) * NUM_RUN_COLUMNS
    num_runs = tl.load(entry + RUN_NUM_RUNS)
    run_length = tl.load(entry + RUN_LENGTH)
    octets_per_run = tl.load(entry + RUN_NUM_OCTETS)
    stream = tl.load(entry + RUN_STREAM).to(tl.uint32)
    num_outer = tl.load(entry + RUN_NUM_OUTER).to(tl.int32)

    begin = ((tile - tl.load(entry + RUN_FIRST_TILE)) * PROGRAMS + part) * BLOCK
    if begin >= num_runs * octets_per_run:
        return
    lane = begin + tl.arange(0, BLOCK)
    run = lane // octets_per_run
    in_run = lane % octets_per_run
    exists = run < num_runs
    first_element = tl.load(entry + RUN_FIRST_ELEMENT) + run * 0
    source_at = run * 0
    target_at = run * 0
    minus_at = run * 0
    is_row = exists
    rest = run
    for step in range(num_outer):
        d = num_outer - 1 - step
        size = tl.load(entry + OUTER_SIZES + d)
        x = rest % size
        rest = rest // size
        target_at += x * tl.load(entry + OUTER_TARGET_STRIDES + d)
        minus_at += x * tl.load(entry + OUTER_TARGET_MINUS_STRIDES + d)
        if HAS_ROWS:
            if d == 0:
                x = tl.load(rows + x, mask=exists, other=0)
                is_row = (x >= 0) & (x < num_source_rows)
                x = tl.where(is_row, x, 0)
        source_at += x * tl.load(entry + OUTER_SOURCE_STRIDES + d)
        first_element += x * tl.load(entry + OUTER_ELEMENT_STRIDES + d)

    octet = (first_element >> 3) + in_run
    low = octet.to(tl.uint32)
    high = (octet >> 32).to(tl.uint32)
    acc = accumulate(
        low=low,
        high=high,
        stream=stream,
        terms=terms,
        num_terms=num_terms,
        seed_0=seed_0,
        coeff_bits_0=coeff_bits_0,
        seed_1=seed_1,
        coeff_bits_1=coeff_bits_1,
        radius_base=radius_base,
        one_bits=one_bits,
        ARITHMETIC=ARITHMETIC,
        FAMILY=FAMILY,
        NUM_TERMS=NUM_TERMS,
        NUM_LANES=8,
        NUM_SIDES=NUM_SIDES,
        UNROLL=1,
    )
    if HAS_ROWS:
        # A row out of range is not read: its result is NaN.
        scale = tl.where(is_row[:, None], scale, float("nan"))
    random_bits = 0
    if STOCHASTIC:
        k0, k1 = key_of(rounding_seed)
        random_bits = octet_values(rounding_octet(low, high, stream, k0, k1), 0)
    # Position within the run; the octets at its ends reach beyond it.
    position = (octet * 8 - first_element)[:, None] + tl.arange(0, 8)[None, :]
    mask = exists[:, None] & (position >= 0) & (position < run_length)
    source = tl.load(entry + RUN_SOURCE).to(tl.pointer_type(DTYPE))
    target = tl.load(entry + RUN_TARGET).to(tl.pointer_type(DTYPE))
    target_minus = tl.load(entry + RUN_TARGET_MINUS).to(tl.pointer_type(DTYPE))
    residual = source  # never read
    if RESIDUALS != "none":
        residual = tl.load(entry + RUN_RESIDUAL).to(tl.pointer_type(tl.int16))
    source_stride = tl.load(entry + RUN_SOURCE_STRIDE)
    finish(
        source=source + source_at[:, None] + position * source_stride,
        target=target + target_at[:, None] + position * tl.load(entry + RUN_TARGET_STRIDE),
        target_minus=target_minus + minus_at[:, None] + position * tl.load(entry + RUN_TARGET_MINUS_STRIDE),
        residual=residual + source_at[:, None] + position * source_stride,
        mask=mask,
        acc=acc,
        terms=terms,
        num_terms=num_terms,
        scale=scale,
        random_bits=random_bits,
        FIRST=0,
        ARITHMETIC=ARITHMETIC,
        DTYPE=DTYPE,
        FAMILY=FAMILY,
        NUM_TERMS=NUM_TERMS,
        NUM_LANES=8,
        NUM_SIDES=NUM_SIDES,
        HAS_INPUT=HAS_INPUT,
        PAIR=PAIR,
        STOCHASTIC=STOCHASTIC,
        RESIDUALS=RESIDUALS,
    )
