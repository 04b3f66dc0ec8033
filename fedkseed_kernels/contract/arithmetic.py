"""Exact arithmetic that NumPy lacks: fused multiply-add in fp32 and fp64, and the roundings to bf16 and fp16.

Everything here is IEEE 754 round to nearest even with subnormals kept, whatever mode the calling thread is
in. bf16 and fp16 values are uint16 bit patterns. NaN payloads are not specified (contract, section 6.1).
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Where glibc's fenv_t keeps the control register, and the bits of it that flush subnormals:
# MXCSR's FTZ and DAZ, and FPCR's FZ.
_FENV_SIZE = 64
_CONTROL_OFFSET_AND_FLUSH_BITS = {"x86_64": (28, 0x8040), "aarch64": (0, 1 << 24)}

_SMALLEST_NORMAL = np.array([2.0**-126], dtype=np.float32)

Pair64 = tuple[NDArray[np.float64], NDArray[np.float64]]


def _flushes_subnormals() -> bool:
    return bool((_SMALLEST_NORMAL * np.float32(0.5))[0] == 0)


@contextlib.contextmanager
def ieee_arithmetic() -> Iterator[None]:
    """Run NumPy with subnormals kept and without warnings, then restore the thread's mode. Also a decorator.

    Raises:
        RuntimeError: the thread flushes subnormals and this platform offers no known way to stop it.
    """
    with np.errstate(all="ignore"):
        if not _flushes_subnormals():
            yield
            return
        known = _CONTROL_OFFSET_AND_FLUSH_BITS.get(platform.machine()) if sys.platform == "linux" else None
        libm = ctypes.CDLL(None)
        if known is None or not hasattr(libm, "fesetenv"):
            raise RuntimeError(
                "the noise contract keeps subnormals, but this thread flushes them to zero; "
                "call torch.set_flush_denormal(False) first"
            )
        offset, flush_bits = known
        callers = ctypes.create_string_buffer(_FENV_SIZE)
        libm.fegetenv(callers)
        ours = ctypes.create_string_buffer(callers.raw, _FENV_SIZE)
        control = ctypes.c_uint32.from_buffer(ours, offset)
        control.value &= ~flush_bits
        libm.fesetenv(ours)
        try:
            yield
        finally:
            libm.fesetenv(callers)


def _two_sum(a: NDArray[np.float64], b: NDArray[np.float64]) -> Pair64:
    """s = fp64(a + b) and the error a + b - s, exact (Knuth)."""
    s = a + b
    b_part = s - a
    return s, (a - (s - b_part)) + (b - b_part)


def _add_round_to_odd(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a + b; where fp64 cannot hold it, the one of its two neighbours whose last bit is 1.

    Such a value rounds to any format at least two bits narrower as the exact sum does (Boldo, Melquiond).
    """
    s, error = _two_sum(a, b)
    pattern = np.atleast_1d(s).view(np.int64)
    inexact_and_even = np.isfinite(s) & (error != 0) & ((pattern & 1) == 0)
    away_from_zero = (error > 0) == (s > 0)
    step = np.where(away_from_zero, 1, -1) * inexact_and_even
    return np.asarray((pattern + step).view(np.float64).reshape(s.shape))


@ieee_arithmetic()
def fma32(a: Any, b: Any, c: Any) -> NDArray[np.float32]:
    """a*b + c with one rounding, in fp32; arguments are fp32 arrays or numbers that broadcast."""
    a64, b64, c64 = (np.asarray(x, dtype=np.float32).astype(np.float64) for x in (a, b, c))
    # 24 + 24 significant bits fit in 53, and no exponent leaves fp64's range: the product is exact.
    product = a64 * b64
    product, c64 = np.broadcast_arrays(product, c64)
    return _add_round_to_odd(product, c64).astype(np.float32)


def _two_product(a: NDArray[np.float64], b: NDArray[np.float64]) -> Pair64:
    """p = fp64(a * b) and the error a*b - p (Dekker), exact where no intermediate leaves the normal range."""

    def split(x: NDArray[np.float64]) -> Pair64:
        scaled = x * 134217729.0  # 2^27 + 1 (Veltkamp)
        high = scaled - (scaled - x)
        return high, x - high

    p = a * b
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _fma64_of_rationals(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact)  # int / int rounds once, to nearest even, subnormals included
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def _magnitude_within(x: NDArray[np.float64], exponent: int) -> NDArray[np.bool_]:
    return (np.abs(x) >= 2.0**-exponent) & (np.abs(x) <= 2.0**exponent)


@ieee_arithmetic()
def fma64(a: Any, b: Any, c: Any) -> NDArray[np.float64]:
    """a*b + c with one rounding, in fp64; arguments are fp64 arrays or numbers that broadcast."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (a, b, c)))
    # Boldo and Melquiond's emulation. Right where every error term is representable: see `ordinary`.
    product, product_error = _two_product(a, b)
    low, low_error = _two_sum(c, product_error)
    high, high_error = _two_sum(product, low)
    result = high + _add_round_to_odd(low_error, high_error)

    ordinary = _magnitude_within(a, 400) & _magnitude_within(b, 400) & _magnitude_within(c, 800)
    finite_product = np.isfinite(a) & np.isfinite(b)
    product_is_zero = finite_product & ((a == 0) | (b == 0))
    result = np.where(~finite_product | product_is_zero, a * b + c, result)  # the product is exact
    # Adding a zero to a product that underflows would lose its sign.
    result = np.where(finite_product & ~product_is_zero & (c == 0), a * b, result)
    # Multiplying first could overflow and make infinity - infinity.
    result = np.where(finite_product & ~np.isfinite(c), c, result)
    extreme = finite_product & np.isfinite(c) & ~product_is_zero & (c != 0) & ~ordinary
    for index in np.argwhere(extreme):
        at = tuple(index)
        result[at] = _fma64_of_rationals(float(a[at]), float(b[at]), float(c[at]))
    return result


def widen_bf16(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The fp32 values of bf16 bit patterns, exact."""
    pattern: NDArray[np.uint32] = stored.astype(np.uint32) << np.uint32(16)
    return pattern.view(np.float32)


@ieee_arithmetic()
def widen_fp16(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The fp32 values of fp16 bit patterns, exact."""
    return stored.view(np.float16).astype(np.float32)


def round_to_bf16(y: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bf16 patterns of fp32 values, to nearest even; overflow gives infinity, NaN a quiet NaN."""
    pattern = y.view(np.uint32)
    last_kept_bit = (pattern >> np.uint32(16)) & np.uint32(1)
    rounded = (pattern + np.uint32(0x7FFF) + last_kept_bit) >> np.uint32(16)
    return np.where(np.isnan(y), _quiet_nan_bf16(pattern), rounded).astype(np.uint16)


@ieee_arithmetic()
def round_to_fp16(y: NDArray[np.float32]) -> NDArray[np.uint16]:
    """fp16 patterns of fp32 values, to nearest even; from 65520 on infinity, NaN a quiet NaN."""
    return y.astype(np.float16).view(np.uint16)


def round_to_bf16_stochastic(y: NDArray[np.float32], random_bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """bf16 patterns of fp32 values: magnitude + random_bits * 2^-16 of the kept last place, truncated."""
    pattern = y.view(np.uint32)
    # Adding to the whole pattern adds to the magnitude: a carry moves into the exponent, and from the largest
    # finite value to infinity. The sign bit is out of reach.
    rounded = (pattern + random_bits) >> np.uint32(16)
    passed = np.where(np.isnan(y), _quiet_nan_bf16(pattern), pattern >> np.uint32(16))
    return np.where(np.isfinite(y), rounded, passed).astype(np.uint16)


def round_to_fp16_stochastic(y: NDArray[np.float32], random_bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """fp16 patterns of fp32 values: magnitude + random_bits * 2^-16 of the kept last place, truncated.

    Bits further than 16 below the kept place (results that are subnormal in fp16) are cut off first.
    """
    pattern = y.view(np.uint32)
    biased_exponent = ((pattern >> np.uint32(23)) & np.uint32(0xFF)).astype(np.int64)
    fraction = (pattern & np.uint32(0x007FFFFF)).astype(np.int64)
    significand = np.where(biased_exponent > 0, fraction | 0x00800000, fraction)
    exponent = np.maximum(biased_exponent, 1) - 127

    num_bits_below = 13 + np.maximum(-14 - exponent, 0)
    aligned = (significand << np.maximum(16 - num_bits_below, 0)) >> np.clip(num_bits_below - 16, 0, 63)
    kept = (aligned + random_bits) >> 16
    # The hidden bit of `kept` counts as one step of the exponent field; so does a carry out of it.
    magnitude = kept + (np.maximum(exponent + 14, 0) << 10)
    magnitude = np.minimum(magnitude, 0x7C00)  # past the largest finite value: infinity
    magnitude = np.where(np.isinf(y), 0x7C00, magnitude)
    magnitude = np.where(np.isnan(y), 0x7E00, magnitude)
    sign = (pattern >> np.uint32(16)) & np.uint32(0x8000)
    return np.asarray(magnitude | sign, dtype=np.uint16)


def value_of_bf16(stored: NDArray[np.uint16], residuals: NDArray[np.int16]) -> NDArray[np.float32]:
    """Section 6.5: the fp32 values of compensated bf16 weights, exact."""
    upper = stored.astype(np.int64) << 16
    return ((upper + residuals) % 2**32).astype(np.uint32).view(np.float32)


def split_to_bf16(y: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Section 6.5: fp32 values as bf16 patterns, to nearest with ties away from zero, and what is left."""
    pattern = y.view(np.uint32).astype(np.int64)
    upper = (pattern + 0x8000) >> 16
    residuals = pattern - (upper << 16)
    is_nan = np.isnan(y)
    weights = np.where(is_nan, (pattern >> 16) | 0x7FC0, upper)
    return weights.astype(np.uint16), np.where(is_nan, 0, residuals).astype(np.int16)


def _exponent_of_fp16(weights: NDArray[np.float32]) -> NDArray[np.int32]:
    """E of section 6.5: 2^E <= |w| < 2^(E + 1), and -14 where |w| < 2^-14, infinite or NaN."""
    ordinary = np.isfinite(weights) & (np.abs(weights) >= 2.0**-14)
    _, exponent = np.frexp(np.where(ordinary, weights, np.float32(2.0**-14)))
    return np.asarray(exponent - 1, dtype=np.int32)


@ieee_arithmetic()
def value_of_fp16(stored: NDArray[np.uint16], residuals: NDArray[np.int16]) -> NDArray[np.float32]:
    """Section 6.5: the fp32 values of compensated fp16 weights."""
    weights = widen_fp16(stored)
    unit = np.ldexp(np.float32(1), _exponent_of_fp16(weights) - 25)
    return fma32(residuals.astype(np.float32), unit, weights)


@ieee_arithmetic()
def split_to_fp16(y: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Section 6.5: fp32 values as fp16 patterns, to nearest even, and what is left."""
    stored = round_to_fp16(y)
    weights = widen_fp16(stored)
    finite = np.isfinite(weights)
    rest = np.where(finite, y, 0).astype(np.float64) - np.where(finite, weights, 0)
    residuals = np.rint(np.ldexp(rest, 25 - _exponent_of_fp16(weights)))  # to nearest even
    return stored, residuals.astype(np.int16)


def value(stored: NDArray[Any], residuals: NDArray[np.int16] | None, dtype: str) -> NDArray[Any]:
    """What stored weights stand for: as they are, widened to fp32, or with residuals as section 6.5 says."""
    if dtype == "bfloat16":
        return widen_bf16(stored) if residuals is None else value_of_bf16(stored, residuals)
    if dtype == "float16":
        return widen_fp16(stored) if residuals is None else value_of_fp16(stored, residuals)
    return stored


def round_stochastically(
    y: NDArray[np.float32], random_bits: NDArray[np.uint16], dtype: str
) -> NDArray[np.uint16]:
    """Section 8 for "bfloat16" or "float16"."""
    rounded = round_to_bf16_stochastic if dtype == "bfloat16" else round_to_fp16_stochastic
    return rounded(y, random_bits)


def split(y: NDArray[np.float32], dtype: str) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Section 6.5: fp32 values as compensated "bfloat16" or "float16" weights."""
    return (split_to_bf16 if dtype == "bfloat16" else split_to_fp16)(y)


def _quiet_nan_bf16(pattern: NDArray[np.uint32]) -> NDArray[np.uint32]:
    quiet: NDArray[np.uint32] = (pattern >> np.uint32(16)) | np.uint32(0x0040)
    return quiet
