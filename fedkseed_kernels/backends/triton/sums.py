"""The primitive of one lane in Triton (docs/noise-contract.md section 6): sums over terms, new weights.

Both kernels call these functions. A lane's sums are a tuple, one tensor [block] for each of its elements, so
that they stay in registers over the whole loop over terms; they are joined after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedkseed_kernels.backends.triton.compensated import compensated_split, compensated_value
from fedkseed_kernels.backends.triton.noise import (
    TAG_RADEMACHER,
    bf16_stochastic,
    fp16_stochastic,
    gaussian_octet,
    group_words,
    key_of,
    rademacher_octet,
)
from fedkseed_kernels.backends.triton.tables import RADEMACHER_GROUP
from fedkseed_kernels.backends.triton.terms import HEADER_RECORDS, RECORD_WORDS

GROUP = tl.constexpr(RADEMACHER_GROUP)
WORDS_OF_RECORD = tl.constexpr(RECORD_WORDS)
RECORDS_OF_HEADER = tl.constexpr(HEADER_RECORDS)


@triton.jit
def with_sign(number, word, SHIFT: tl.constexpr):
    """-number where the bit that SHIFT moves to the top of the word is set; number: a scalar or a tensor."""
    if number.dtype == tl.float32:
        bits = number.to(tl.uint32, bitcast=True)
        if SHIFT == 31:  # nothing to mask: shift and add are one instruction
            return ((word << SHIFT) + bits).to(tl.float32, bitcast=True)
        return (((word << SHIFT) & 0x80000000) ^ bits).to(tl.float32, bitcast=True)
    else:
        return tl.where(((word << SHIFT) & 0x80000000) != 0, -number, number)


@triton.jit
def add_gaussian(acc, low, high, stream, k0, k1, coefficient, radius_base, one_bits, NUM_SIDES: tl.constexpr):
    """acc with one term added to each of its sums: eight of the plus side, then those of the minus side.

    low, high: octets.
    """
    z = gaussian_octet(low, high, stream, k0, k1, radius_base, one_bits)
    sums = ()
    for side in tl.static_range(NUM_SIDES):
        c = -coefficient if side == 1 else coefficient
        for i in tl.static_range(8):
            sums = sums + (tl.fma(z[i].to(acc[0].dtype), c, acc[side * 8 + i]),)
    return sums


@triton.jit
def add_signs(acc, low, high, stream, k0, k1, q):
    """acc with the integer q added to those of eight sums whose element's sign is -1; low, high: octets."""
    signs = rademacher_octet(low, high, stream, k0, k1)
    sums = ()
    for i in tl.static_range(8):
        sums = sums + (acc[i] + ((signs >> i) & 1).to(acc[0].dtype) * q,)
    return sums


@triton.jit
def add_sign_pairs(acc, low, high, stream, k0, k1, q):
    """The same for 128 elements, two in each of 64 sums of 64 bits; low, high: groups.

    A window has the sign of one element in bit 0 and that of another in bit 31, which counts -2^31: one
    product with q serves both. Of two words of noise, a and b, 64 bits from bit s of a on begin with such a
    pair: bit s of a, bit s - 1 of b.
    """
    words = group_words(low, high, stream, TAG_RADEMACHER, k0, k1)
    sums = ()
    for half in tl.static_range(2):
        a, b = words[2 * half], words[2 * half + 1]
        for s in tl.static_range(32):
            window = ((a >> s) | (b << (32 - s))) & 0x80000001 if s else (a & 1) | (b & 0x80000000)
            product = window.to(tl.int32, bitcast=True).to(tl.int64) * q
            sums = sums + (acc[half * 32 + s] + product,)
    return sums


@triton.jit
def separate_pairs(acc, total):
    """The 128 sums A (contract 6.3) from 64 pairs, int32 in element order; total: of all q, int32 [1, 1]."""
    whole = tl.reshape(total, (1,)).to(tl.int64)
    sums = ()
    for half in tl.static_range(2):
        second = ()
        for i in tl.static_range(32):
            # total - 2 (S - 2^31 S') = A + 2^32 S', where A has 31 bits at most.
            joined = whole - 2 * acc[half * 32 + i]
            first = joined.to(tl.int32)
            other = (joined - first.to(tl.int64)) >> 32
            sums = sums + (first,)
            second = second + ((whole - 2 * other).to(tl.int32),)
        for i in tl.static_range(32):
            sums = sums + (second[(i + 1) % 32],)
    return sums


@triton.jit
def two_signs(low, high, stream, seed_0, seed_1, equal, unequal):
    """The eight sums of two Rademacher terms: equal or -equal, unequal or -unequal, but +0 for a zero."""
    k0, k1 = key_of(seed_0)
    first = rademacher_octet(low, high, stream, k0, k1)
    k0, k1 = key_of(seed_1)
    differ = first ^ rademacher_octet(low, high, stream, k0, k1)
    # Not ~differ: with NumPy 2 the interpreter of Triton 3.7 cannot invert unsigned words.
    alike = differ ^ 0xFFFFFFFF
    # Written as products of words: the bits of a scalar condition, all or none.
    signs = first & (differ | (0 - (equal != 0).to(tl.uint32))) & ((0 - (unequal != 0).to(tl.uint32)) | alike)
    sums = ()
    for i in tl.static_range(8):
        sums = sums + (with_sign(tl.where((differ & (1 << i)) != 0, unequal, equal), signs, 31 - i),)
    return sums


@triton.jit
def read_header(terms):
    """The first record: number of terms, alpha, rounding seed."""
    alpha = tl.load((terms + 1).to(tl.pointer_type(tl.float32)))
    return tl.load(terms), alpha, tl.load((terms + 2).to(tl.pointer_type(tl.int64)))


@triton.jit
def read_record(terms, k, FACTOR: tl.constexpr):
    """Term k: its key words, and its coefficient or integer."""
    # Two 32-bit loads: from one of 64 bits LLVM makes 64-bit arithmetic of the whole of Philox.
    record = terms + (k + RECORDS_OF_HEADER) * WORDS_OF_RECORD
    k0 = tl.load(record).to(tl.uint32, bitcast=True)
    k1 = tl.load(record + 1).to(tl.uint32, bitcast=True)
    return k0, k1, tl.load((record + 2).to(tl.pointer_type(FACTOR)))


@triton.jit
def negative_zeros(like, ARITHMETIC: tl.constexpr):
    """-0.0 of a tensor's shape, from its bits: a constant of that value is +0.0 in Triton up to 3.7."""
    return tl.full(like.shape, 0x80000000, tl.uint32).to(tl.float32, bitcast=True).to(ARITHMETIC)


@triton.jit
def negated(sums, ARITHMETIC: tl.constexpr):
    """-sums, of zeros too: in Triton 3.6 the operator is a subtraction from +0, which leaves +0 as it is."""
    return negative_zeros(sums, ARITHMETIC) - sums


@triton.jit
def accumulate(
    low,
    high,
    stream,
    terms,
    num_terms,
    seed_0,
    coeff_bits_0,
    seed_1,
    coeff_bits_1,
    radius_base,
    one_bits,
    ARITHMETIC: tl.constexpr,
    FAMILY: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    NUM_LANES: tl.constexpr,
    NUM_SIDES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The sums over all terms, a tuple of NUM_LANES * NUM_SIDES.

    Of a loop over Rademacher terms they are the integers A of contract 6.3: `sums_as_numbers`.
    coeff_bits_0, coeff_bits_1: coefficients as fp64 patterns, of two Rademacher terms their sums
    (`terms.PackedTerms`).
    """
    INTEGER: tl.constexpr = tl.int64 if tl.float64 == ARITHMETIC else tl.int32
    IS_INTEGER: tl.constexpr = FAMILY == "rademacher"
    BY_GROUP: tl.constexpr = NUM_LANES == GROUP
    number = coeff_bits_0.to(tl.int64).to(tl.float64, bitcast=True).to(ARITHMETIC)
    if NUM_TERMS == 0 and IS_INTEGER:
        total = tl.full((1, 1), 0, INTEGER)
        start = tl.full(low.shape, 0, tl.int64 if BY_GROUP else INTEGER)
        acc = ()
        for _ in tl.static_range(64 if BY_GROUP else 8):
            acc = acc + (start,)
        for k in tl.range(0, num_terms, loop_unroll_factor=UNROLL):
            k0, k1, q = read_record(terms, k, INTEGER)
            total += q
            if BY_GROUP:
                acc = add_sign_pairs(acc, low, high, stream, k0, k1, q)
            else:
                acc = add_signs(acc, low, high, stream, k0, k1, q)
        if BY_GROUP:
            acc = separate_pairs(acc, total)
        else:
            negative = acc
            acc = ()
            for i in tl.static_range(8):
                acc = acc + ((tl.reshape(total, (1,)) - negative[i]) - negative[i],)
    elif NUM_TERMS == 0:
        start = negative_zeros(low, ARITHMETIC)
        acc = ()
        for _ in tl.static_range(8 * NUM_SIDES):
            acc = acc + (start,)
        for k in tl.range(0, num_terms, loop_unroll_factor=UNROLL):
            k0, k1, c = read_record(terms, k, ARITHMETIC)
            acc = add_gaussian(acc, low, high, stream, k0, k1, c, radius_base, one_bits, NUM_SIDES)
    elif IS_INTEGER:
        if NUM_TERMS == 2:
            unequal = coeff_bits_1.to(tl.int64).to(tl.float64, bitcast=True).to(ARITHMETIC)
            acc = two_signs(low, high, stream, seed_0, seed_1, number, unequal)
        else:
            k0, k1 = key_of(seed_0)
            octet_bits = rademacher_octet(low, high, stream, k0, k1)
            acc = ()
            for i in tl.static_range(8):
                acc = acc + (with_sign(number, octet_bits, 31 - i),)
    else:
        start = negative_zeros(low, ARITHMETIC)
        acc = ()
        for _ in tl.static_range(8 * NUM_SIDES):
            acc = acc + (start,)
        k0, k1 = key_of(seed_0)
        acc = add_gaussian(acc, low, high, stream, k0, k1, number, radius_base, one_bits, NUM_SIDES)
        if NUM_TERMS == 2:
            number = coeff_bits_1.to(tl.int64).to(tl.float64, bitcast=True).to(ARITHMETIC)
            k0, k1 = key_of(seed_1)
            acc = add_gaussian(acc, low, high, stream, k0, k1, number, radius_base, one_bits, NUM_SIDES)
    return acc


@triton.jit
def sums_as_numbers(sums, terms, num_terms, ARITHMETIC: tl.constexpr):
    """Contract 6.3: acc = f(A) 2^-s of the integers A [block, 8]; -0 without a term."""
    unit = tl.load((terms + WORDS_OF_RECORD).to(tl.pointer_type(ARITHMETIC)))
    return tl.where(num_terms == 0, negative_zeros(sums, ARITHMETIC), sums.to(ARITHMETIC) * unit)


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
    elif tl.bfloat16 == DTYPE:
        return bf16_stochastic(y, random_bits)
    else:
        return fp16_stochastic(y, random_bits)


@triton.jit
def finish(
    source,
    target,
    target_minus,
    residual,
    mask,
    acc,
    terms,
    num_terms,
    scale,
    random_bits,
    FIRST: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    DTYPE: tl.constexpr,
    FAMILY: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    NUM_LANES: tl.constexpr,
    NUM_SIDES: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    PAIR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RESIDUALS: tl.constexpr,
):
    """Sections 6.1, 6.2 and 6.5 after the sums: scale, add, round or split, store.

    Pointers and mask are [block, 8]. RESIDUALS: "none", "read" for results that are rounded, or "split".
    """
    sums = octet_values(acc, FIRST)
    if FAMILY == "rademacher" and NUM_TERMS == 0:
        sums = sums_as_numbers(sums, terms, num_terms, ARITHMETIC)
    if not HAS_INPUT:
        tl.store(target, sums.to(DTYPE), mask=mask)
    else:
        stored = tl.load(source, mask=mask)
        if RESIDUALS == "none":
            w = stored.to(ARITHMETIC)
        else:
            stored_residual = tl.load(residual, mask=mask)
            w = compensated_value(stored, stored_residual)
        factor = scale.to(ARITHMETIC)
        # Without a term and with alpha 1 the bytes stay as they are.
        unchanged = (num_terms == 0) & (scale == 1.0)
        y = tl.fma(w, factor, sums)
        if RESIDUALS == "split":
            result, new_residual = compensated_split(y, DTYPE)
            if NUM_TERMS == 0:
                new_residual = tl.where(unchanged, stored_residual, new_residual)
            tl.store(residual, new_residual, mask=mask)
        else:
            result = rounded(y, random_bits, DTYPE, STOCHASTIC)
        if NUM_TERMS == 0:
            result = tl.where(unchanged, stored, result)
        if PAIR:
            # A single product mirrors exactly, its zero too; longer sums were kept for both sides, but for
            # those of integers, whose zero is the same on both.
            if NUM_SIDES == 2:
                minus = octet_values(acc, FIRST + NUM_LANES)
            elif FAMILY == "rademacher":
                minus = tl.where(sums == 0, sums, negated(sums, ARITHMETIC))
            else:
                minus = negated(sums, ARITHMETIC)
            result_minus = rounded(tl.fma(w, factor, minus), random_bits, DTYPE, STOCHASTIC)
            if NUM_TERMS == 0:
                result_minus = tl.where(unchanged, stored, result_minus)
            tl.store(target_minus, result_minus, mask=mask)
        tl.store(target, result, mask=mask)
