"""The primitive in Triton (docs/noise-contract.md section 6): two kernels over a table of tensors.

A program works on blocks of octets, eight elements that share a Gaussian group. Each octet belongs to one
lane, whose sums stay in registers over the whole loop over terms and are joined after it.

* `segments_kernel`: memory and element indices run together and octets are whole and aligned: nearly all
  weights of a model.
* `runs_kernel`: anything else: odd ends, strides, views, gathered rows.

`launch` picks the parameters and says what the arguments mean. Fields of the tables are read by their
position in `tables.SEGMENT_FIELDS` and `tables.RUN_FIELDS`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedkseed_kernels.backends.triton import noise
from fedkseed_kernels.backends.triton.sums import accumulate, finish, octet_values, read_header
from fedkseed_kernels.backends.triton.tables import RUN_DIMS, RUN_FIELDS, RUN_FIRST_DIM, RUN_MAX_OUTER

key_of = noise.key_of
rounding_octet = noise.rounding_octet
NUM_RUN_FIELDS = tl.constexpr(len(RUN_FIELDS) + len(RUN_DIMS) * RUN_MAX_OUTER)
FIRST_DIM = tl.constexpr(RUN_FIRST_DIM)
MAX_OUTER = tl.constexpr(RUN_MAX_OUTER)

# Arguments whose value must not lead to another compilation.
_RUN_TIME = (
    "num_entries",
    "num_steps",
    "num_source_rows",
    "seed_0",
    "bits_0",
    "seed_1",
    "bits_1",
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
    bits_0: tl.int64,
    seed_1: tl.int64,
    bits_1: tl.int64,
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
    entry = table + _find_entry(table, 1, num_entries, num_steps, tile)
    source = tl.load(entry + num_entries).to(tl.pointer_type(DTYPE))
    target = tl.load(entry + 2 * num_entries).to(tl.pointer_type(DTYPE))
    target_minus = tl.load(entry + 3 * num_entries).to(tl.pointer_type(DTYPE))
    residual = source  # never read
    if RESIDUALS != "none":
        residual = tl.load(entry + 7 * num_entries).to(tl.pointer_type(tl.int16))
    num_octets = tl.load(entry + 4 * num_entries)
    first_octet = tl.load(entry + 5 * num_entries)
    stream = tl.load(entry + 6 * num_entries).to(tl.uint32)

    high = (first_octet >> 32).to(tl.uint32)
    # Relative to the segment, at a whole group: negative where the first group begins before the segment.
    start = -(first_octet % OCTETS) + ((tile - tl.load(entry)) * PROGRAMS + part) * (
        BLOCK * NUM_BLOCKS * OCTETS
    )
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
                low,
                high_word,
                stream,
                terms,
                num_terms,
                seed_0,
                bits_0,
                seed_1,
                bits_1,
                radius_base,
                one_bits,
                ARITHMETIC,
                FAMILY,
                NUM_TERMS,
                NUM_LANES,
                NUM_SIDES,
                UNROLL,
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
                    tl.multiple_of(source + begin * 8, 16) + offset,
                    tl.multiple_of(target + begin * 8, 16) + offset,
                    tl.multiple_of(target_minus + begin * 8, 16) + offset,
                    tl.multiple_of(residual + begin * 8, 16) + offset,
                    mask,
                    acc,
                    terms,
                    num_terms,
                    scale,
                    random_bits,
                    i * 8,
                    ARITHMETIC,
                    DTYPE,
                    FAMILY,
                    NUM_TERMS,
                    NUM_LANES,
                    NUM_SIDES,
                    HAS_INPUT,
                    PAIR,
                    STOCHASTIC,
                    RESIDUALS,
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
    bits_0: tl.int64,
    seed_1: tl.int64,
    bits_1: tl.int64,
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
    entry = table + _find_entry(table, NUM_RUN_FIELDS, num_entries, num_steps, tile) * NUM_RUN_FIELDS
    num_runs = tl.load(entry + 4)
    run_length = tl.load(entry + 5)
    octets_per_run = tl.load(entry + 6)
    stream = tl.load(entry + 8).to(tl.uint32)
    num_outer = tl.load(entry + 12).to(tl.int32)
    dims = entry + FIRST_DIM

    begin = ((tile - tl.load(entry)) * PROGRAMS + part) * BLOCK
    if begin >= num_runs * octets_per_run:
        return
    lane = begin + tl.arange(0, BLOCK)
    run = lane // octets_per_run
    in_run = lane % octets_per_run
    exists = run < num_runs
    first_element = tl.load(entry + 7) + run * 0
    source_at = run * 0
    target_at = run * 0
    minus_at = run * 0
    is_row = exists
    rest = run
    for step in range(num_outer):
        d = num_outer - 1 - step
        size = tl.load(dims + d)
        x = rest % size
        rest = rest // size
        target_at += x * tl.load(dims + 2 * MAX_OUTER + d)
        minus_at += x * tl.load(dims + 3 * MAX_OUTER + d)
        if HAS_ROWS:
            if d == 0:
                x = tl.load(rows + x, mask=exists, other=0)
                is_row = (x >= 0) & (x < num_source_rows)
                x = tl.where(is_row, x, 0)
        source_at += x * tl.load(dims + MAX_OUTER + d)
        first_element += x * tl.load(dims + 4 * MAX_OUTER + d)

    octet = (first_element >> 3) + in_run
    low = octet.to(tl.uint32)
    high = (octet >> 32).to(tl.uint32)
    acc = accumulate(
        low,
        high,
        stream,
        terms,
        num_terms,
        seed_0,
        bits_0,
        seed_1,
        bits_1,
        radius_base,
        one_bits,
        ARITHMETIC,
        FAMILY,
        NUM_TERMS,
        8,
        NUM_SIDES,
        1,
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
    source = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    target = tl.load(entry + 2).to(tl.pointer_type(DTYPE))
    target_minus = tl.load(entry + 3).to(tl.pointer_type(DTYPE))
    residual = source  # never read
    if RESIDUALS != "none":
        residual = tl.load(entry + 13).to(tl.pointer_type(tl.int16))
    source_stride = tl.load(entry + 9)
    finish(
        source + source_at[:, None] + position * source_stride,
        target + target_at[:, None] + position * tl.load(entry + 10),
        target_minus + minus_at[:, None] + position * tl.load(entry + 11),
        residual + source_at[:, None] + position * source_stride,
        mask,
        acc,
        terms,
        num_terms,
        scale,
        random_bits,
        0,
        ARITHMETIC,
        DTYPE,
        FAMILY,
        NUM_TERMS,
        8,
        NUM_SIDES,
        HAS_INPUT,
        PAIR,
        STOCHASTIC,
        RESIDUALS,
    )
