"""The noise contract in Triton: Philox, the Gaussian transform, Rademacher signs, stochastic rounding.

Section numbers are those of docs/noise-contract.md. Every constant comes from the reference, which a test
holds to that page. Kernels that use these must be launched with enable_fp_fusion=False: each fma is written
out, and everything else rounds by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedkseed_kernels.contract import reference


def _constant(value: float) -> tl.constexpr:
    return tl.constexpr(value if isinstance(value, int) else float(value))


ROUNDS = _constant(reference.PHILOX_NUM_ROUNDS)
M0 = _constant(reference.PHILOX_MULTIPLIER_0)
M1 = _constant(reference.PHILOX_MULTIPLIER_1)
W0 = _constant(reference.PHILOX_KEY_STEP_0)
W1 = _constant(reference.PHILOX_KEY_STEP_1)
TAG_GAUSSIAN = _constant(reference.TAG_GAUSSIAN)
TAG_RADEMACHER = _constant(reference.TAG_RADEMACHER)
TAG_ROUNDING = _constant(reference.TAG_ROUNDING)
RADIUS_MASK = _constant(reference.RADIUS_WORD_MASK)
RADIUS_CENTRE = _constant(reference.RADIUS_BASE)
MANTISSA_MASK = _constant(reference.MANTISSA_MASK)
LOG_SLOPE = _constant(reference.EXPONENT_SCALE)
LOG_0 = _constant(reference.EXPONENT_OFFSET)
LOG_5, LOG_4, LOG_3, LOG_2, LOG_1 = map(_constant, reference.LOG_COEFFICIENTS)
RSQRT_MAGIC = _constant(reference.RSQRT_START_PATTERN)
SQRT_2, SQRT_1, SQRT_0 = map(_constant, reference.SQRT_COEFFICIENTS)
ANGLE_SCALE = _constant(reference.ANGLE_SCALE)
SIN_2, SIN_1, SIN_0 = map(_constant, reference.SINE_COEFFICIENTS)
COS_3, COS_2, COS_1, COS_0 = map(_constant, reference.COSINE_COEFFICIENTS)
SQRT_TWO = _constant(reference.SQRT_TWO)

# Bit patterns that kernels take as run-time arguments: with a constant on both sides of the mask, the
# compiler makes two instructions of (x & mask) | pattern; with one of them in a register, a single LOP3.
RADIUS_BASE_PATTERN = reference.RADIUS_BASE_PATTERN
ONE_PATTERN = reference.ONE_PATTERN


@triton.jit
def multiply_wide(x, factor: tl.constexpr):
    """The high and the low word of a 64-bit product of 32-bit numbers: one instruction on a GPU."""
    product = x.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox4x32_10(x0, x1, x2, x3, k0, k1):
    """Section 2: the four output words. Counter and key words are uint32, scalars or tensors."""
    for i in tl.static_range(ROUNDS):
        high0, low0 = multiply_wide(x0, M0)
        high1, low1 = multiply_wide(x2, M1)
        x0 = high1 ^ x1 ^ (k0 + (i * W0) % (1 << 32))
        x2 = high0 ^ x3 ^ (k1 + (i * W1) % (1 << 32))
        x1 = low1
        x3 = low0
    return x0, x1, x2, x3


@triton.jit
def key_of(seed):
    """The key words of a seed that is an int64 scalar."""
    bits = seed.to(tl.int64)
    return bits.to(tl.uint32), (bits >> 32).to(tl.uint32)


@triton.jit
def group_words(low, high, stream, tag: tl.constexpr, k0, k1):
    """Section 3: the words of the groups high 2^32 + low; low [block], all uint32, key (k0, k1)."""
    nothing = low ^ low
    return philox4x32_10(low, nothing + stream, nothing + high, nothing + tag, k0, k1)


@triton.jit
def normal_pair(word, radius_base, one_bits):
    """Section 4: the normals (even, odd) of a word; radius_base, one_bits: the two patterns above."""
    u = ((word & RADIUS_MASK) | radius_base).to(tl.float32, bitcast=True) - RADIUS_CENTRE
    m = ((u.to(tl.uint32, bitcast=True) & MANTISSA_MASK) | one_bits).to(tl.float32, bitcast=True)
    e = tl.fma(u.to(tl.int32, bitcast=True).to(tl.float32), LOG_SLOPE, LOG_0)
    q = tl.fma(m, LOG_5, LOG_4)
    q = tl.fma(q, m, LOG_3)
    q = tl.fma(q, m, LOG_2)
    q = tl.fma(q, m, LOG_1)
    s = tl.fma(q, m, e)
    # 0 - (bits - magic): with a constant on the left the interpreter finds no tensor to ask for a type.
    y = ((0 - (s.to(tl.uint32, bitcast=True) - RSQRT_MAGIC)) >> 1).to(tl.float32, bitcast=True)
    a = s * y
    h = a * y
    p = tl.fma(tl.fma(h, SQRT_2, SQRT_1), h, SQRT_0)
    r = a * p
    b = word.to(tl.int32, bitcast=True).to(tl.float32) * ANGLE_SCALE
    t = b * b
    x = tl.fma(tl.fma(t, SIN_2, SIN_1), t, SIN_0) * b
    k = tl.fma(tl.fma(tl.fma(t, COS_3, COS_2), t, COS_1), t, COS_0)
    half_sin = x * k
    half_cos = tl.fma(-x, x, SQRT_TWO)
    g = r * half_sin
    return tl.fma(-g, half_sin, r), g * half_cos


@triton.jit
def gaussian_octet(low, high, stream, k0, k1, radius_base, one_bits):
    """The eight normals of each group high 2^32 + low, as a tuple in element order, fp32 [block] each."""
    words = group_words(low, high, stream, TAG_GAUSSIAN, k0, k1)
    values = ()
    for j in tl.static_range(4):
        even, odd = normal_pair(words[j], radius_base, one_bits)
        values = values + (even, odd)
    return values


@triton.jit
def rademacher_octet(low, high, stream, k0, k1):
    """Section 5: for elements 8 o .. 8 o + 7, o = high 2^32 + low, their eight sign bits, uint32 [block]."""
    group_low = (low >> 4) | (high << 28)
    w0, w1, w2, w3 = group_words(group_low, high >> 4, stream, TAG_RADEMACHER, k0, k1)
    first_half = tl.where((low & 4) == 0, w0, w1)
    second_half = tl.where((low & 4) == 0, w2, w3)
    return tl.where((low & 8) == 0, first_half, second_half) >> ((low & 3) * 8)


@triton.jit
def rounding_octet(low, high, stream, k0, k1):
    """Section 8: the 16 random bits of each element of octet high 2^32 + low, a tuple of eight uint32."""
    words = group_words(low, high, stream, TAG_ROUNDING, k0, k1)
    values = ()
    for j in tl.static_range(4):
        values = values + (words[j] & 0xFFFF, words[j] >> 16)
    return values


@triton.jit
def bf16_stochastic(y, random_bits):
    """Section 8 for bf16: y fp32, random_bits uint32 below 2^16. Infinity has no bits for r to carry from."""
    bits = y.to(tl.uint32, bitcast=True)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    kept = tl.where(is_nan, (bits >> 16) | 0x0040, (bits + random_bits) >> 16)
    return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def fp16_stochastic(y, random_bits):
    """Section 8 for fp16: the kept last place is made worth 2^16, r is added, and the rest cut off."""
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    is_normal = exponent >= 113  # at least 2^-14
    significand = tl.where(exponent > 0, (magnitude & 0x007FFFFF) | 0x00800000, magnitude)
    # Bits below the kept place: 13 for a normal result, more for a subnormal one; past 47 nothing is left.
    discarded = tl.where(is_normal, 13, 126 - tl.maximum(exponent, 1))
    up = 16 - tl.minimum(discarded, 16)
    down = tl.minimum(tl.maximum(discarded, 16) - 16, 31)
    kept = (((significand << up) >> down) + random_bits) >> 16
    base = tl.where(is_normal, exponent - 113, 0) << 10
    result = tl.minimum(base + kept, 0x7C00)
    result = tl.where(magnitude >= 0x47800000, 0x7C00, result)  # 65536 and above, infinity
    result = tl.where(magnitude > 0x7F800000, 0x7E00, result)
    return (result | ((bits >> 16) & 0x8000)).to(tl.uint16).to(tl.float16, bitcast=True)
