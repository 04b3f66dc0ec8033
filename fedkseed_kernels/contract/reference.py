"""The noise contract (docs/noise-contract.md) in NumPy: what every backend must equal, bit for bit.

Written to be read beside that page; section numbers are the page's. It is also the backend of last resort,
100 to 350 times slower than the native one. Stored values are NumPy arrays of float32 and float64, and
uint16 bit patterns for bf16 and fp16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkseed_kernels.contract import arithmetic
from fedkseed_kernels.contract.arithmetic import fma32, fma64, ieee_arithmetic
from fedkseed_kernels.contract.sums import integer_terms, kept_terms

CONTRACT_VERSION = 1


def _fp32(hexadecimal: str) -> np.float32:
    """A constant that fp32 holds exactly."""
    exact = float.fromhex(hexadecimal)
    rounded: np.float32 = np.float32(exact)
    assert float(rounded) == exact, f"{hexadecimal} is not an fp32 value"
    return rounded


# Section 2.
PHILOX_NUM_ROUNDS = 10
PHILOX_MULTIPLIER_0 = 0xD2511F53
PHILOX_MULTIPLIER_1 = 0xCD9E8D57
PHILOX_KEY_STEP_0 = 0x9E3779B9
PHILOX_KEY_STEP_1 = 0xBB67AE85

# Section 3.
TAG_GAUSSIAN = 1
TAG_RADEMACHER = 2
TAG_ROUNDING = 3
TAG_DERIVED = 4
GAUSSIAN_GROUP_BITS = 3
RADEMACHER_GROUP_BITS = 7

# Section 4, in the order of their appearance; every one is exact in fp32.
RADIUS_WORD_MASK = 0x0001FFFF
RADIUS_BASE_PATTERN = 0x42800000
RADIUS_BASE = _fp32("0x1.fffffep+5")
MANTISSA_MASK = 0x007FFFFF
ONE_PATTERN = 0x3F800000
EXPONENT_SCALE = _fp32("-0x1.62e43p-23")
EXPONENT_OFFSET = _fp32("0x1.651828p+7")
LOG_COEFFICIENTS = (
    _fp32("-0x1.f1af44p-5"),
    _fp32("0x1.2247fep-1"),
    _fp32("-0x1.1d988cp+1"),
    _fp32("0x1.3854aep+2"),
    _fp32("-0x1.692664p+2"),
)
RSQRT_START_PATTERN = 0xBE3F8000
SQRT_COEFFICIENTS = (_fp32("0x1.55bb3ap-1"), _fp32("-0x1.c48b7ap+0"), _fp32("0x1.0d72b4p+1"))
ANGLE_SCALE = _fp32("0x1p-31")
SINE_COEFFICIENTS = (_fp32("0x1.0b82a2p-8"), _fp32("-0x1.16011ap-3"), _fp32("0x1.52249p+0"))
COSINE_COEFFICIENTS = (
    _fp32("-0x1.192f62p-11"),
    _fp32("0x1.b4bcf4p-6"),
    _fp32("-0x1.0993cep-1"),
    _fp32("0x1.ae89f8p+0"),
)
SQRT_TWO = _fp32("0x1.6a09e6p+0")

# What NumPy holds values of each dtype in: bf16 and fp16 as bit patterns.
STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16, "float64": np.float64}
DTYPES = tuple(STORAGE)
COMPENSATED_DTYPES = ("bfloat16", "float16")
FAMILIES = ("gaussian", "rademacher")
ROUNDINGS = ("nearest", "stochastic")

# Elements worked on at a time: bounds the memory of the temporaries to a few MB.
CHUNK_ELEMENTS = 1 << 15


def philox4x32_10(counters: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Section 2: the four output words of Philox4x32-10.

    Args:
        counters: uint32 [..., 4].
        keys: uint32 [..., 2]; leading dimensions broadcast against those of counters.
    Returns: uint32 [..., 4].
    """
    low_half = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (counters[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (keys[..., i].astype(np.uint64) for i in range(2))
    for _ in range(PHILOX_NUM_ROUNDS):
        p0 = np.uint64(PHILOX_MULTIPLIER_0) * c0
        p1 = np.uint64(PHILOX_MULTIPLIER_1) * c2
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & low_half, high0 ^ c3 ^ k1, p0 & low_half
        k0 = (k0 + np.uint64(PHILOX_KEY_STEP_0)) & low_half
        k1 = (k1 + np.uint64(PHILOX_KEY_STEP_1)) & low_half
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def group_words(seed: int, stream: int, groups: NDArray[np.uint64], tag: int) -> NDArray[np.uint32]:
    """Section 3: the words of each group, uint32 [n, 4] for groups uint64 [n]. The seed is taken mod 2^64."""
    seed = int(seed) % 2**64
    key = np.array([seed % 2**32, seed >> 32], dtype=np.uint32)
    counters = np.empty((*groups.shape, 4), dtype=np.uint32)
    counters[..., 0] = groups & np.uint64(0xFFFFFFFF)
    counters[..., 1] = stream
    counters[..., 2] = groups >> np.uint64(32)
    counters[..., 3] = tag
    return philox4x32_10(counters, key)


@ieee_arithmetic()
def normals_from_words(words: NDArray[np.uint32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Section 4: the two normals (even, odd) of each uint32 word, fp32 of the same shape."""
    w = np.ascontiguousarray(words, dtype=np.uint32)

    u = ((w & np.uint32(RADIUS_WORD_MASK)) | np.uint32(RADIUS_BASE_PATTERN)).view(np.float32) - RADIUS_BASE
    i = u.view(np.uint32)
    m = ((i & np.uint32(MANTISSA_MASK)) | np.uint32(ONE_PATTERN)).view(np.float32)
    e = fma32(i.astype(np.float32), EXPONENT_SCALE, EXPONENT_OFFSET)
    q = fma32(LOG_COEFFICIENTS[0], m, LOG_COEFFICIENTS[1])
    q = fma32(q, m, LOG_COEFFICIENTS[2])
    q = fma32(q, m, LOG_COEFFICIENTS[3])
    q = fma32(q, m, LOG_COEFFICIENTS[4])
    s = fma32(q, m, e)
    y = ((np.uint32(RSQRT_START_PATTERN) - s.view(np.uint32)) >> np.uint32(1)).view(np.float32)
    a = s * y
    h = a * y
    p = fma32(SQRT_COEFFICIENTS[0], h, SQRT_COEFFICIENTS[1])
    p = fma32(p, h, SQRT_COEFFICIENTS[2])
    r = a * p

    b = w.view(np.int32).astype(np.float32) * ANGLE_SCALE
    t = b * b
    x = fma32(SINE_COEFFICIENTS[0], t, SINE_COEFFICIENTS[1])
    x = fma32(x, t, SINE_COEFFICIENTS[2])
    x = x * b
    k = fma32(COSINE_COEFFICIENTS[0], t, COSINE_COEFFICIENTS[1])
    k = fma32(k, t, COSINE_COEFFICIENTS[2])
    k = fma32(k, t, COSINE_COEFFICIENTS[3])
    sine = x * k
    cosine = fma32(-x, x, SQRT_TWO)
    g = r * sine
    return fma32(-g, sine, r), g * cosine


def normal_digest(first: int, count: int) -> int:
    """Sum over words w in [first, first + count) of (bits(even) + 2^32 bits(odd)) (2 w + 1) mod 2^64.

    One number for the transform of many words, to compare implementations by; not part of the contract.
    """
    digest = 0
    for start in range(first, first + count, CHUNK_ELEMENTS):
        words = np.arange(start, min(start + CHUNK_ELEMENTS, first + count), dtype=np.uint64)
        even, odd = normals_from_words(words.astype(np.uint32))
        bits = even.view(np.uint32) | (odd.view(np.uint32).astype(np.uint64) << np.uint64(32))
        digest += int((bits * (np.uint64(2) * words + np.uint64(1))).sum())
    return digest % 2**64


def _spread_over_groups(
    elements: NDArray[np.uint64], group_bits: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64] | slice]:
    """The groups that the elements lie in, each once, and where each element is in their concatenation."""
    if elements.size and bool((elements[1:] - elements[:-1] == 1).all()):
        first_group = int(elements[0]) >> group_bits
        num_groups = (int(elements[-1]) >> group_bits) - first_group + 1
        start = int(elements[0]) - (first_group << group_bits)
        groups = np.uint64(first_group) + np.arange(num_groups, dtype=np.uint64)
        return groups, slice(start, start + elements.size)
    groups, of_element = np.unique(elements >> np.uint64(group_bits), return_inverse=True)
    lanes = (elements & np.uint64((1 << group_bits) - 1)).astype(np.int64)
    return groups, (of_element.reshape(-1).astype(np.int64) << group_bits) + lanes


def _gaussian_of_groups(seed: int, stream: int, groups: NDArray[np.uint64]) -> NDArray[np.float32]:
    words = group_words(seed, stream, groups, TAG_GAUSSIAN)
    return np.stack(normals_from_words(words), axis=-1).reshape(-1)


def _rademacher_of_groups(seed: int, stream: int, groups: NDArray[np.uint64]) -> NDArray[np.float32]:
    words = group_words(seed, stream, groups, TAG_RADEMACHER)
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    z: NDArray[np.float32] = np.where(bits == 1, np.float32(-1), np.float32(1))
    return z.reshape(-1)


_FAMILY_TABLE = {
    "gaussian": (GAUSSIAN_GROUP_BITS, _gaussian_of_groups),
    "rademacher": (RADEMACHER_GROUP_BITS, _rademacher_of_groups),
}


def _noise(seed: int, stream: int, elements: Any, family: str) -> NDArray[np.float32]:
    shape = np.shape(elements)
    flat = _checked_elements(elements)
    _check_stream(stream)
    group_bits, of_groups = _FAMILY_TABLE[_checked_choice("family", family, FAMILIES)]
    z: NDArray[np.float32] = np.empty(flat.size, dtype=np.float32)
    for start in range(0, flat.size, CHUNK_ELEMENTS):
        chunk = slice(start, start + CHUNK_ELEMENTS)
        groups, positions = _spread_over_groups(flat[chunk], group_bits)
        z[chunk] = of_groups(seed, stream, groups)[positions]
    result: NDArray[np.float32] = z.reshape(shape)
    return result


def gaussian(seed: int, stream: int, elements: Any) -> NDArray[np.float32]:
    """Section 4: z of the given element indices (integers of any shape), fp32 of the same shape."""
    return _noise(seed, stream, elements, "gaussian")


def rademacher(seed: int, stream: int, elements: Any) -> NDArray[np.float32]:
    """Section 5: z, +1 or -1, of the given element indices (integers of any shape), fp32 of that shape."""
    return _noise(seed, stream, elements, "rademacher")


def normal_array(seed: int, stream: int, elements: Any, dtype: str, family: str = "gaussian") -> NDArray[Any]:
    """Section 6.1, `normal`: the noise itself in a dtype's stored form."""
    _checked_choice("dtype", dtype, DTYPES)
    return round_to_nearest(_noise(seed, stream, elements, family), dtype)


def accumulate(
    seeds: Sequence[int],
    coeffs: Any,
    stream: int,
    elements: Any,
    family: str = "gaussian",
    fp64: bool = False,
) -> NDArray[Any]:
    """acc of section 6.1: from -0, acc = fma(c_k, z_k, acc) in index order, terms with c_k = 0 skipped; of
    section 6.3 for Rademacher noise.

    Returns: fp32, or fp64 if asked for, of the shape of elements.
    """
    shape = np.shape(elements)
    flat = _checked_elements(elements)
    _check_stream(stream)
    group_bits, of_groups = _FAMILY_TABLE[_checked_choice("family", family, FAMILIES)]
    terms = kept_terms(seeds, coeffs, fp64, family)
    number = np.float64 if fp64 else np.float32
    acc: NDArray[Any] = np.full(flat.size, -0.0, dtype=number)
    if family == "rademacher" and terms:
        integers, shift = integer_terms([c for _, c in terms], fp64)
        sums = np.zeros(flat.size, dtype=np.int64)
        for start in range(0, flat.size, CHUNK_ELEMENTS):
            chunk = slice(start, start + CHUNK_ELEMENTS)
            groups, positions = _spread_over_groups(flat[chunk], group_bits)
            for (seed, _), q in zip(terms, integers, strict=True):
                sums[chunk] += of_groups(seed, stream, groups)[positions].astype(np.int64) * q
        with ieee_arithmetic():
            scale: Any = number(2.0**-shift)
            acc = sums.astype(number) * scale
        return np.asarray(acc.reshape(shape))
    for start in range(0, flat.size, CHUNK_ELEMENTS):
        chunk = slice(start, start + CHUNK_ELEMENTS)
        groups, positions = _spread_over_groups(flat[chunk], group_bits)
        for seed, coefficient in terms:
            z = of_groups(seed, stream, groups)[positions]
            acc[chunk] = fma64(coefficient, z, acc[chunk]) if fp64 else fma32(coefficient, z, acc[chunk])
    result: NDArray[Any] = acc.reshape(shape)
    return result


def rounding_bits(rounding_seed: int, stream: int, elements: Any) -> NDArray[np.uint16]:
    """Section 8: the 16 random bits of each element."""
    shape = np.shape(elements)
    flat = _checked_elements(elements)
    _check_stream(stream)
    groups, positions = _spread_over_groups(flat, GAUSSIAN_GROUP_BITS)
    words = group_words(rounding_seed, stream, groups, TAG_ROUNDING)
    halves = np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), axis=-1)
    result: NDArray[np.uint16] = halves.astype(np.uint16).reshape(-1)[positions].reshape(shape)
    return result


def view_elements(
    shape: Sequence[int], full_shape: Sequence[int], start: Sequence[int]
) -> NDArray[np.uint64]:
    """Section 6.4: the element indices of a view, uint64 of the view's shape.

    Element (i_0, i_1, ...) has sum over d of (start_d + i_d) * stride_d, with full_shape's row-major strides.

    Raises:
        ValueError: the view does not lie within full_shape.
    """
    fits = len(shape) == len(full_shape) == len(start) and all(
        0 <= first <= first + size <= full for first, size, full in zip(start, shape, full_shape, strict=True)
    )
    if not fits:
        got = f"shape {tuple(shape)} at {tuple(start)} of {tuple(full_shape)}"
        raise ValueError(f"expected a view within its full shape, got {got}")
    elements = np.zeros(tuple(shape), dtype=np.uint64)
    stride = 1
    for d in reversed(range(len(shape))):
        along = np.uint64(start[d]) + np.arange(shape[d], dtype=np.uint64)
        elements += (along * np.uint64(stride)).reshape(-1, *(1,) * (len(shape) - 1 - d))
        stride *= full_shape[d]
    return elements


def seed_axpy_array(
    weights: NDArray[Any],
    elements: Any,
    seeds: Sequence[int],
    coeffs: Any,
    *,
    dtype: str,
    stream: int = 0,
    alpha: float = 1.0,
    family: str = "gaussian",
    rounding: str = "nearest",
    rounding_seed: int | None = None,
    residuals: NDArray[np.int16] | None = None,
    wide: bool = False,
) -> NDArray[Any]:
    """Section 6: the new stored values of weights whose element indices are `elements`.

    Args:
        weights: stored values, any shape: float32, float64, or uint16 bit patterns for bf16 and fp16.
        elements: integer array of the same shape, each in [0, 2^63).
        seeds, coeffs: the K terms. coeffs are fp64 numbers, rounded once to the arithmetic format.
        dtype: one of DTYPES. alpha is rounded to fp32. rounding_seed is needed for stochastic rounding.
        residuals: of compensated bf16 or fp16 weights (section 6.5), int16 of the same shape; only read.
        wide: of bf16 or fp16 weights, y itself.
    Returns: a new array of the shape and storage type of weights, or of float32 if wide.
    Raises:
        ValueError: anything that does not fit the above, or a coefficient that is not finite.
    """
    _checked_choice("rounding", rounding, ROUNDINGS)
    if rounding == "stochastic" and rounding_seed is None:
        raise ValueError("expected a rounding_seed for stochastic rounding, got None; pass an integer")
    if wide and dtype not in COMPENSATED_DTYPES:
        raise ValueError(f"expected bfloat16 or float16 weights for wide results, got {dtype}")
    results = _results(weights, residuals, elements, seeds, coeffs, dtype, stream, alpha, family)
    stored: NDArray[Any] = weights.copy().reshape(-1)
    if wide:
        stored = arithmetic.value(stored, None if residuals is None else residuals.reshape(-1), dtype)
    for chunk, y in results:
        if wide:
            stored[chunk] = y
        elif rounding == "stochastic" and rounding_seed is not None and dtype in ("bfloat16", "float16"):
            random_bits = rounding_bits(rounding_seed, stream, np.reshape(elements, -1)[chunk])
            stored[chunk] = arithmetic.round_stochastically(y, random_bits, dtype)
        else:
            stored[chunk] = round_to_nearest(y, dtype)
    result: NDArray[Any] = stored.reshape(weights.shape)
    return result


def seed_axpy_compensated_array(
    weights: NDArray[np.uint16],
    residuals: NDArray[np.int16],
    elements: Any,
    seeds: Sequence[int],
    coeffs: Any,
    *,
    dtype: str,
    stream: int = 0,
    alpha: float = 1.0,
    family: str = "gaussian",
) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Section 6.5, in place: new weights and residuals of compensated bf16 or fp16 weights.

    Args and errors: those of `seed_axpy_array`.
    """
    stored, stored_residuals = weights.copy().reshape(-1), residuals.copy().reshape(-1)
    for chunk, y in _results(weights, residuals, elements, seeds, coeffs, dtype, stream, alpha, family):
        stored[chunk], stored_residuals[chunk] = arithmetic.split(y, dtype)
    return stored.reshape(weights.shape), stored_residuals.reshape(weights.shape)


def _results(
    weights: NDArray[Any],
    residuals: NDArray[np.int16] | None,
    elements: Any,
    seeds: Sequence[int],
    coeffs: Any,
    dtype: str,
    stream: int,
    alpha: float,
    family: str,
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """y of section 6.1 by slices of the flattened weights; nothing where the stored bytes are to stay."""
    _checked_choice("dtype", dtype, DTYPES)
    if weights.dtype != STORAGE[dtype]:
        raise ValueError(f"expected {np.dtype(STORAGE[dtype])} storage for {dtype}, got {weights.dtype}")
    if weights.shape != np.shape(elements):
        got = f"shapes {np.shape(elements)} and {weights.shape}"
        raise ValueError(f"expected one element index for each weight, got {got}")
    if residuals is not None and (dtype not in COMPENSATED_DTYPES or residuals.dtype != np.int16):
        raise ValueError(f"expected int16 residuals of bfloat16 or float16, got {residuals.dtype} of {dtype}")
    if residuals is not None and residuals.shape != weights.shape:
        raise ValueError(f"expected one residual for each weight, got {residuals.shape} and {weights.shape}")
    fp64 = dtype == "float64"
    with ieee_arithmetic():
        alpha32 = np.float32(alpha)
    if not np.isfinite(alpha32):
        raise ValueError(f"expected alpha to be finite in fp32, got {alpha}")

    flat_elements = _checked_elements(elements)
    flat_weights = weights.reshape(-1)
    flat = None if residuals is None else residuals.reshape(-1)
    if alpha32 == 1 and not kept_terms(seeds, coeffs, fp64, family):
        return
    for start in range(0, flat_weights.size, CHUNK_ELEMENTS):
        chunk = slice(start, start + CHUNK_ELEMENTS)
        acc = accumulate(seeds, coeffs, stream, flat_elements[chunk], family, fp64)
        w = arithmetic.value(flat_weights[chunk], None if flat is None else flat[chunk], dtype)
        yield chunk, fma64(np.float64(alpha32), w, acc) if fp64 else fma32(alpha32, w, acc)


def seed_axpy_pair_array(
    weights: NDArray[Any], elements: Any, seeds: Sequence[int], coeffs: Any, **options: Any
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Section 6.2: both sides, the second with every coefficient negated. Options as for seed_axpy_array."""
    coeffs = np.asarray(coeffs, dtype=np.float64)
    return (
        seed_axpy_array(weights, elements, seeds, coeffs, **options),
        seed_axpy_array(weights, elements, seeds, -coeffs, **options),
    )


@ieee_arithmetic()
def round_to_nearest(y: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Section 7: the stored form of arithmetic results, to nearest even."""
    if dtype == "bfloat16":
        return arithmetic.round_to_bf16(y)
    return arithmetic.round_to_fp16(y) if dtype == "float16" else y.astype(STORAGE[dtype])


def _checked_elements(elements: Any) -> NDArray[np.uint64]:
    array = np.asarray(elements).reshape(-1)
    if array.size == 0:
        return array.astype(np.uint64)
    if array.dtype.kind not in "iu" or int(array.min()) < 0 or int(array.max()) >= 2**63:
        got = f"{array.dtype} in [{array.min()}, {array.max()}]"
        raise ValueError(f"expected integer element indices in [0, 2^63), got {got}")
    return array.astype(np.uint64)


def _check_stream(stream: int) -> None:
    if not 0 <= stream < 2**32:
        raise ValueError(f"expected a stream in [0, 2^32), got {stream}")


def _checked_choice(what: str, got: str, known: tuple[str, ...]) -> str:
    if got not in known:
        raise ValueError(f"expected {what} to be one of {', '.join(known)}, got {got!r}")
    return got
