"""Instructions on bit patterns: NumPy arrays of unsigned numbers, an element for each lane."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I8, I16, I32, I64 = np.int8, np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
UNSIGNED: dict[int, Any] = {8: U8, 16: U16, 32: U32, 64: U64}
where = np.where

CANONICAL_NAN = U32(0x7FFFFFFF)

# glibc's is rounded once whatever the operands; it serves those at the ends of the range, one by one.
_libm_fma = ctypes.CDLL("libm.so.6").fma
_libm_fma.argtypes, _libm_fma.restype = (ctypes.c_double,) * 3, ctypes.c_double


def canonical32(r: Array) -> Array:
    """Bits of fp32 results, with the one NaN that the hardware makes."""
    bits, nan = r.view(U32), r != r
    return where(nan, CANONICAL_NAN, bits) if nan.any() else bits


def add32(a: Array, b: Array) -> Array:
    return canonical32(np.atleast_1d(a.view(F32) + b.view(F32)))


def sub32(a: Array, b: Array) -> Array:
    return canonical32(np.atleast_1d(a.view(F32) - b.view(F32)))


def mul32(a: Array, b: Array) -> Array:
    return canonical32(np.atleast_1d(a.view(F32) * b.view(F32)))


def fma32(a: Array, b: Array, c: Array) -> Array:
    """The product is exact in fp64; the sum is rounded to odd there: rounding it again is rounding once."""
    x, z = np.atleast_1d(a.view(F32).astype(F64) * b.view(F32).astype(F64)), c.view(F32).astype(F64)
    s = x + z
    t = s - x
    e = (x - (s - t)) + (z - t)
    bits = s.view(I64)
    odd = (e != 0) & ((bits & 1) == 0) & (np.abs(s) < np.inf)
    if odd.any():
        bits = bits + where(odd, where((e > 0) == (s > 0), 1, -1), 0)
    return canonical32(bits.view(F64).astype(F32))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _split(a: Array) -> tuple[Array, Array]:
    t = a * 134217729.0
    high = t - (t - a)
    return high, a - high


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Error-free products and sums, one rounded to odd (Boldo and Melquiond); libm at the range's ends."""
    x, y, z = np.broadcast_arrays(*(np.atleast_1d(v).view(F64) for v in (a, b, c)))
    uh = x * y
    (xh, xl), (yh, yl) = _split(x), _split(y)
    ul = ((xh * yh - uh) + xh * yl + xl * yh) + xl * yl
    th, tl = _two_sum(z, ul)
    vh, vl = _two_sum(uh, th)
    s, e = _two_sum(tl, vl)
    bits = s.view(I64)
    bits = bits + where((e != 0) & ((bits & 1) == 0), where((e > 0) == (s > 0), 1, -1), 0)
    r = vh + bits.view(F64)
    plain = (x == 0) | (y == 0) | ~np.isfinite(x) | ~np.isfinite(y) | ~np.isfinite(z)
    r = where(plain, uh + z, r)
    product, addend = np.abs(uh), np.abs(z)
    fine = (product > 2.0**-800) & (product < 2.0**900) & (addend < 2.0**900)
    fine &= ((addend > 2.0**-800) | (z == 0)) & (np.abs(x) < 2.0**900) & (np.abs(y) < 2.0**900)
    at = np.flatnonzero(~(plain | fine))
    if at.size:
        operands = (v[at].tolist() for v in (x, y, z))
        r[at] = [_libm_fma(*three) for three in zip(*operands, strict=True)]
    return r.view(U64)


def f32_from_f16(a: Array) -> Array:
    return canonical32(a.view(F16).astype(F32))


def f16_from_f32(a: Array) -> Array:
    x = a.view(F32)
    return where(x != x, U16(0x7FFF), x.astype(F16).view(U16))


def bf16_from_f32(a: Array) -> Array:
    x = a.view(F32)
    nearest = (a + U32(0x7FFF) + ((a >> U32(16)) & U32(1))) >> U32(16)
    return where(x != x, U32(0x7FFF), nearest).astype(U16)


def shl(a: Array, n: Array, bits: int) -> Array:
    if np.ndim(n) == 0 and n < bits:
        return np.asarray(a << a.dtype.type(n))
    amount = where(n < bits, n, 0).astype(a.dtype)
    return where(n < bits, a << amount, a.dtype.type(0))


def shr(a: Array, n: Array, bits: int) -> Array:
    if np.ndim(n) == 0 and n < bits:
        return np.asarray(a >> a.dtype.type(n))
    if a.dtype.kind == "i":
        return np.asarray(a >> np.minimum(n, bits - 1).astype(a.dtype))
    return where(n < bits, a >> where(n < bits, n, 0).astype(a.dtype), a.dtype.type(0))


def divide(a: Array, b: Array, remainder: bool) -> Array:
    """Towards zero; all bits of a division by zero are set."""
    safe = where(b == 0, b.dtype.type(1), b)
    q = a // safe
    if a.dtype.kind == "i":
        q = q + ((q * safe != a) & ((a < 0) != (safe < 0)))
    r = (a - q * safe) if remainder else q
    return where(b == 0, ~a.dtype.type(0), r).astype(a.dtype)


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Any function of three bits, by its table; what compilers write most is written out."""
    match table:
        case 0x96:
            return a ^ b ^ c
        case 0xEA:
            return (a & b) | c
        case 0xF8:
            return a | (b & c)
    r = np.zeros_like(np.broadcast_arrays(np.atleast_1d(a), b, c)[0])
    for i in range(8):
        if table >> i & 1:
            r = r | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return r


def prmt(a: Array, b: Array, c: Array) -> Array:
    """Four bytes of the eight of a and b, chosen by the nibbles of c; with bit 3 only the byte's sign."""
    both = a.astype(U64) | b.astype(U64) << U64(32)
    r = np.zeros(both.shape, U32)
    for i in range(4):
        nibble = (c >> U32(4 * i)) & U32(15)
        byte = (both >> ((nibble & U32(7)).astype(U64) * U64(8))) & U64(0xFF)
        byte = where(nibble & U32(8), where(byte & U64(0x80), U64(0xFF), U64(0)), byte)
        r = r | byte.astype(U32) << U32(8 * i)
    return r


def _ones(count: Array) -> Array:
    return where(count >= 64, ~U64(0), (U64(1) << np.minimum(count, 63).astype(U64)) - U64(1))


def bfi(a: Array, b: Array, pos: Array, length: Array, bits: int) -> Array:
    """b with bits pos .. pos + length - 1 from the low bits of a."""
    pos, length = (pos & U32(0xFF)).astype(I64), (length & U32(0xFF)).astype(I64)
    at = np.minimum(pos, 63).astype(U64)
    mask = where(pos < bits, _ones(np.minimum(length, np.maximum(bits - pos, 0))) << at, U64(0))
    return ((b.astype(U64) & ~mask) | (a.astype(U64) << at & mask)).astype(UNSIGNED[bits])


def bfe(a: Array, pos: Array, length: Array, bits: int, signed: bool) -> Array:
    """Bits pos .. pos + length - 1; a signed field goes on with its top bit (at most the number's own)."""
    pos, length = (pos & U32(0xFF)).astype(I64), (length & U32(0xFF)).astype(I64)
    wide, sign = a.astype(U64), np.zeros(a.shape, U64)
    if signed:
        top = np.maximum(np.minimum(pos + length - 1, bits - 1), 0).astype(U64)
        sign = where(length > 0, wide >> top & U64(1), U64(0))
    field = where(pos < bits, wide >> np.minimum(pos, 63).astype(U64), U64(0))
    ones = _ones(np.minimum(length, np.maximum(bits - pos, 0)))
    return ((field & ones) | where(sign > 0, ~ones, U64(0))).astype(UNSIGNED[bits])


# Fragments of mma.m16n8k32 with 8-bit numbers, by lane = 4 g + t, register and byte: (row, column).
def mma_a(lane: Any, register: int, byte: Any) -> tuple[Any, Any]:
    return lane // 4 + 8 * (register & 1), lane % 4 * 4 + byte + 16 * (register >> 1)


def mma_b(lane: Any, register: int, byte: Any) -> tuple[Any, Any]:
    return lane % 4 * 4 + byte + 16 * register, lane // 4


def mma_c(lane: Any, register: int) -> tuple[Any, Any]:
    return lane // 4 + 8 * (register >> 1), lane % 4 * 2 + (register & 1)


_LANE, _BYTE = np.arange(32)[:, None], np.arange(4)[None, :]
_A = [mma_a(_LANE, r, _BYTE) for r in range(4)]
_B = [mma_b(_LANE, r, _BYTE) for r in range(2)]
_C = [mma_c(np.arange(32), r) for r in range(4)]


def mma_u8s8(a: Sequence[Array], b: Sequence[Array], c: Sequence[Array]) -> list[Array]:
    """D = A B + C in every warp; sums wrap. All products of a sum fit into the 24 bits of an fp32 number."""
    warps = a[0].size // 32
    left, right = np.empty((warps, 16, 32), F32), np.empty((warps, 32, 8), F32)
    for r in range(4):
        left[:, _A[r][0], _A[r][1]] = a[r].view(U8).reshape(warps, 32, 4)
    for r in range(2):
        right[:, _B[r][0], _B[r][1]] = b[r].view(I8).reshape(warps, 32, 4)
    product = np.matmul(left, right).astype(I32).view(U32)
    return [c[r] + product[:, _C[r][0], _C[r][1]].reshape(-1) for r in range(4)]
