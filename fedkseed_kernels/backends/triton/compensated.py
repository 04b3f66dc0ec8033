"""Compensated weights in Triton (docs/noise-contract.md section 6.5): weight and residual for one fp32 value.

Weights are bf16 or fp16 tensors, residuals int16 of the same shape. What the contract says by cases of the
weight is here arithmetic on fp32 patterns, without branches.
"""

from __future__ import annotations

import triton
import triton.language as tl

_EXPONENT_OF_MINUS_14 = tl.constexpr((127 - 14) << 23)
_INFINITY = tl.constexpr(0x7F800000)
# 1.5 2^23, whose last place is 1: added to a number below 2^22, it rounds that to an integer in its low bits.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _bf16_value(weight, residual):
    high = weight.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return (high + residual.to(tl.int32).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _bf16_split(y):
    # Of a NaN the pattern of a quiet one whose lower half is 0: rounding would carry others into the sign.
    bits = tl.where(y == y, y.to(tl.uint32, bitcast=True), 0x7FC00000)
    weight = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return weight, bits.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _fp16_exponent(widened):
    """The pattern of 2^E for a widened weight; that of infinity if it is infinite or NaN.

    There the contract takes 2^-14, but value and residual are the same: infinite or NaN, and 0.
    """
    return tl.maximum(widened.to(tl.uint32, bitcast=True) & _INFINITY, _EXPONENT_OF_MINUS_14)


@triton.jit
def _fp16_value(weight, residual):
    widened = weight.to(tl.float32)
    unit = (_fp16_exponent(widened) - (25 << 23)).to(tl.float32, bitcast=True)  # 2^(E - 25)
    return tl.fma(residual.to(tl.float32), unit, widened)


@triton.jit
def _fp16_split(y):
    weight = y.to(tl.float16)
    widened = weight.to(tl.float32)
    exponent = _fp16_exponent(widened)
    # 2^(25 - E), from the exponents 127 + 25 - E = (2 127 + 25) - (127 + E).
    per_unit = (((2 * 127 + 25) << 23) - exponent).to(tl.float32, bitcast=True)
    # Difference and product are exact, at most 2^14. The rounder's own pattern ends in 16 zeros.
    rounded = ((y - widened) * per_unit + _ROUNDER).to(tl.uint32, bitcast=True)
    residual = tl.where(exponent == _INFINITY, 0, rounded).to(tl.uint16).to(tl.int16, bitcast=True)
    return weight, residual


@triton.jit
def compensated_value(weight, residual):
    """The fp32 number that a weight, bf16 or fp16, and its residual stand for."""
    if weight.dtype == tl.bfloat16:
        return _bf16_value(weight, residual)
    else:
        return _fp16_value(weight, residual)


@triton.jit
def compensated_split(y, DTYPE: tl.constexpr):
    """fp32 y as a weight of DTYPE and an int16 residual."""
    if tl.bfloat16 == DTYPE:
        return _bf16_split(y)
    else:
        return _fp16_split(y)
