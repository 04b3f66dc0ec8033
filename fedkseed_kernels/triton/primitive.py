"""The primitive of one lane in Triton (docs/noise-contract.md section 6): sums over terms, new weights.

Functions for the kernels of `seed_axpy`. A lane's sums are a tuple, one tensor [block] for each of its
elements, so that they stay in registers over the whole loop over terms; they are joined after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedkseed_kernels.triton import noise

gaussian_octet = noise.gaussian_octet
rademacher_octet = noise.rademacher_octet
group_words = noise.group_words
key_of = noise.key_of
bf16_stochastic = noise.bf16_stochastic
fp16_stochastic = noise.fp16_stochastic
TAG_RADEMACHER = noise.TAG_RADEMACHER


@triton.jit
def signed(coefficient, word, SHIFT: tl.constexpr):
    """-coefficient where the bit that SHIFT moves to the top of the word is set, else coefficient."""
    sign = (word << SHIFT) & 0x80000000
    if coefficient.dtype == tl.float32:
        if SHIFT == 31:  # nothing to mask: shift and add are one instruction
            return ((word << SHIFT) + coefficient.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
        return (sign ^ coefficient.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        return tl.where(sign != 0, -coefficient, coefficient)


@triton.jit
def add_term(
    acc,
    low,
    high,
    stream,
    k0,
    k1,
    coefficient,
    radius_base,
    one_bits,
    FAMILY: tl.constexpr,
    NUM_LANES: tl.constexpr,
    NUM_SIDES: tl.constexpr,
):
    """acc with one term added to each of its sums: those of the plus side, then those of the minus side.

    low, high: octets, or for NUM_LANES == 128 groups of 128 elements.
    """
    sums = ()
    if FAMILY == "gaussian":
        z = gaussian_octet(low, high, stream, k0, k1, radius_base, one_bits)
        for side in tl.static_range(NUM_SIDES):
            c = -coefficient if side == 1 else coefficient
            for i in tl.static_range(NUM_LANES):
                sums = sums + (tl.fma(z[i].to(acc[0].dtype), c, acc[side * NUM_LANES + i]),)
    else:
        if NUM_LANES == 8:
            octet_bits = rademacher_octet(low, high, stream, k0, k1)
            words = (octet_bits,)
        else:
            words = group_words(low, high, stream, TAG_RADEMACHER, k0, k1)
        for side in tl.static_range(NUM_SIDES):
            c = -coefficient if side == 1 else coefficient
            for i in tl.static_range(NUM_LANES):
                # fma(c, +-1, acc) has the rounding of one addition.
                product = signed(c, words[i // 32], 31 - i % 32)
                sums = sums + (acc[side * NUM_LANES + i] + product,)
    return sums


@triton.jit
def read_header(terms):
    """The first record: number of terms, alpha, rounding seed."""
    alpha = tl.load((terms + 1).to(tl.pointer_type(tl.float32)))
    return tl.load(terms), alpha, tl.load((terms + 2).to(tl.pointer_type(tl.int64)))


@triton.jit
def accumulate(
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
    ARITHMETIC: tl.constexpr,
    FAMILY: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    NUM_LANES: tl.constexpr,
    NUM_SIDES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The sums over all terms, a tuple of NUM_LANES * NUM_SIDES."""
    start = tl.full(low.shape, -0.0, ARITHMETIC)
    acc = ()
    for _ in tl.static_range(NUM_LANES * NUM_SIDES):
        acc = acc + (start,)
    if NUM_TERMS == 0:
        for k in tl.range(0, num_terms, loop_unroll_factor=UNROLL):
            # Two 32-bit loads: from one of 64 bits LLVM makes 64-bit arithmetic of the whole of Philox.
            record = terms + (k + 1) * 4
            k0 = tl.load(record).to(tl.uint32, bitcast=True)
            k1 = tl.load(record + 1).to(tl.uint32, bitcast=True)
            c = tl.load((record + 2).to(tl.pointer_type(ARITHMETIC)))
            acc = add_term(
                acc, low, high, stream, k0, k1, c, radius_base, one_bits, FAMILY, NUM_LANES, NUM_SIDES
            )
    else:
        c = bits_0.to(tl.int64).to(tl.float64, bitcast=True).to(ARITHMETIC)
        k0, k1 = key_of(seed_0)
        acc = add_term(acc, low, high, stream, k0, k1, c, radius_base, one_bits, FAMILY, NUM_LANES, NUM_SIDES)
        if NUM_TERMS == 2:
            c = bits_1.to(tl.int64).to(tl.float64, bitcast=True).to(ARITHMETIC)
            k0, k1 = key_of(seed_1)
            acc = add_term(
                acc, low, high, stream, k0, k1, c, radius_base, one_bits, FAMILY, NUM_LANES, NUM_SIDES
            )
    return acc


@triton.jit
def octet_values(lanes, FIRST: tl.constexpr):
    """lanes[FIRST .. FIRST + 7], each [block], as [block, 8].

    Joined from the highest bit of the position down, so that a thread's eight values are neighbours and
    nothing has to move between threads.
    """
    even = tl.join(tl.join(lanes[FIRST], lanes[FIRST + 4]), tl.join(lanes[FIRST + 2], lanes[FIRST + 6]))
    odd = tl.join(tl.join(lanes[FIRST + 1], lanes[FIRST + 5]), tl.join(lanes[FIRST + 3], lanes[FIRST + 7]))
    joined = tl.join(even, odd)
    return tl.reshape(joined, (joined.shape[0], 8))


@triton.jit
def rounded(y, random_bits, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Sections 7 and 8: y in the stored dtype."""
    if not STOCHASTIC:
        return y.to(DTYPE)
    elif DTYPE == tl.bfloat16:
        return bf16_stochastic(y, random_bits)
    else:
        return fp16_stochastic(y, random_bits)


@triton.jit
def finish(
    source,
    target,
    target_minus,
    mask,
    acc,
    num_terms,
    scale,
    random_bits,
    FIRST: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    DTYPE: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    NUM_LANES: tl.constexpr,
    NUM_SIDES: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    PAIR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Sections 6.1 and 6.2 after the sums: scale, add, round, store. Pointers and mask are [block, 8]."""
    sums = octet_values(acc, FIRST)
    if not HAS_INPUT:
        tl.store(target, sums.to(DTYPE), mask=mask)
    else:
        stored = tl.load(source, mask=mask)
        w = stored.to(ARITHMETIC)
        factor = scale.to(ARITHMETIC)
        # Without a term and with alpha 1 the bytes stay as they are.
        unchanged = (num_terms == 0) & (scale == 1.0)
        result = rounded(tl.fma(w, factor, sums), random_bits, DTYPE, STOCHASTIC)
        if NUM_TERMS == 0:
            result = tl.where(unchanged, stored, result)
        if PAIR:
            # A single product mirrors exactly, its zero too; longer sums were kept for both sides.
            minus = octet_values(acc, FIRST + NUM_LANES) if NUM_SIDES == 2 else -sums
            result_minus = rounded(tl.fma(w, factor, minus), random_bits, DTYPE, STOCHASTIC)
            if NUM_TERMS == 0:
                result_minus = tl.where(unchanged, stored, result_minus)
            tl.store(target_minus, result_minus, mask=mask)
        tl.store(target, result, mask=mask)
