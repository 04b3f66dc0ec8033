"""The exact fma and the roundings of the reference against rational arithmetic and torch's own casts."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rationals import BF16, FP16, FP32, FP64, Format

from fedkseed_kernels.contract import arithmetic

NUM_CASES = 3000
# Zeros, subnormals, the smallest normal, neighbours of one, large numbers, roots of the smallest subnormal.
SPECIAL = {
    np.float32: "0 -0 0x1p-149 -0x1p-149 0x1p-126 1 -1 0x1.000002p0 0x1p127 0x1p-75 -0x1p-74 0x1p-24",
    np.float64: "0 -0 0x1p-1074 -0x1p-1074 0x1p-1022 1 -1 0x1.0000000000001p0 0x1p1023 0x1p-537 -0x1p-538",
}


def nasty(random: np.random.Generator, dtype: type[np.floating], count: int) -> NDArray[np.floating]:
    """Finite values of any exponent, many with few significant bits, many special."""
    width = 8 * np.dtype(dtype).itemsize
    bits = random.integers(0, 2**width, count, dtype=f"u{width // 8}")
    bits[: count // 2] &= np.array(2**width - 2 ** (width * 5 // 8), dtype=bits.dtype)
    values = random.permutation(bits).view(dtype)
    near_one = (1 + random.random(count)) * 2.0 ** random.integers(-30, 30, count)
    values = np.where(random.random(count) < 0.5, near_one.astype(dtype), values)
    special = np.array([float.fromhex(literal) for literal in SPECIAL[dtype].split()], dtype=dtype)
    values = np.where(random.random(count) < 0.3, random.choice(special, count), values)
    return np.where(np.isfinite(values), values, dtype(1)).astype(dtype)


@np.errstate(all="ignore")
def fma_cases(dtype: type[np.floating]) -> tuple[NDArray[np.floating], ...]:
    random = np.random.default_rng(10)
    a, b, c = (nasty(random, dtype, NUM_CASES) for _ in range(3))
    cancelling = random.random(NUM_CASES) < 0.4  # what is left is the rounding error of the product
    c[cancelling] = -(a * b)[cancelling]
    # Half an ulp of c and a little: a second rounding goes wrong here.
    a[:50], b[:50], c[:50] = 1 + dtype(2) ** -12, dtype(2) ** -13 * (1 + dtype(2) ** -12), 1
    return a, b, np.where(np.isfinite(c), c, dtype(1)).astype(dtype)


def expected_fma(a: float, b: float, c: float, fmt: Format) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact != 0:
        rounded = fmt.nearest(exact)
        return rounded if rounded else float(np.copysign(0.0, float(1 if exact > 0 else -1)))
    product_sign = np.copysign(1.0, a) * np.copysign(1.0, b)
    both_negative = product_sign < 0 and np.copysign(1.0, c) < 0
    return -0.0 if both_negative and (a == 0 or b == 0) else 0.0


@pytest.mark.parametrize(
    ("dtype", "fma", "fmt"),
    [(np.float32, arithmetic.fma32, FP32), (np.float64, arithmetic.fma64, FP64)],
    ids=["fp32", "fp64"],
)
def test_fma_rounds_once(dtype: type[np.floating], fma: object, fmt: Format) -> None:
    a, b, c = fma_cases(dtype)
    got = fma(a, b, c)  # type: ignore[operator]
    expected = np.array([expected_fma(*map(float, abc), fmt) for abc in zip(a, b, c, strict=True)], dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), expected.view(f"u{got.itemsize}"))


def test_fma_cases_tell_two_roundings_from_one() -> None:
    a, b, c = fma_cases(np.float32)
    with np.errstate(all="ignore"):
        twice = (a * b + c).view(np.uint32)
        through_fp64 = (a.astype(np.float64) * b + c).astype(np.float32).view(np.uint32)
    exact = arithmetic.fma32(a, b, c).view(np.uint32)
    assert (twice != exact).sum() > NUM_CASES // 20
    assert (through_fp64 != exact).any()


@pytest.mark.parametrize("fma", [arithmetic.fma32, arithmetic.fma64], ids=["fp32", "fp64"])
def test_fma_with_infinities_and_nan(fma: object) -> None:
    inf, nan, huge = np.inf, np.nan, 1e38 if fma is arithmetic.fma32 else 1e308
    a = [inf, inf, 1, inf, huge, -huge, nan]
    b = [1, 0, 1, 1, huge, huge, 1]
    c = [1, 1, -inf, -inf, -inf, 1, 1]
    expected = [inf, nan, -inf, nan, -inf, -inf, nan]
    np.testing.assert_array_equal(fma(a, b, c), expected)  # type: ignore[operator]


def values_to_round(torch_dtype: torch.dtype) -> NDArray[np.float32]:
    """Every value of the 16-bit dtype, every midpoint, and their neighbours in fp32."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch_dtype).to(torch.float32).numpy()
    values = np.sort(values[np.isfinite(values)])
    midpoints = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    largest = values[-1] + (values[-1] - values[-2]) / 2
    centres = np.concatenate((values, midpoints, [largest, -largest])).astype(np.float32)
    around = [np.nextafter(centres, np.float32(toward)) for toward in (-np.inf, np.inf)]
    special = np.array([np.inf, -np.inf, np.nan, -0.0, 2.0**-149, 3e38, 65519.996, 65520], dtype=np.float32)
    return np.concatenate((centres, *around, special))


@pytest.mark.parametrize(
    ("torch_dtype", "rounded"),
    [(torch.bfloat16, arithmetic.round_to_bf16), (torch.float16, arithmetic.round_to_fp16)],
    ids=["bf16", "fp16"],
)
def test_nearest_equals_torch(torch_dtype: torch.dtype, rounded: object) -> None:
    y = values_to_round(torch_dtype)
    expected = torch.from_numpy(y).to(torch_dtype)
    got = torch.from_numpy(rounded(y).view(np.int16)).view(torch_dtype)  # type: ignore[operator]
    same = (got.view(torch.int16) == expected.view(torch.int16)) | (got.isnan() & expected.isnan())
    assert same.all()


@pytest.mark.parametrize(
    ("torch_dtype", "widen"),
    [(torch.bfloat16, arithmetic.widen_bf16), (torch.float16, arithmetic.widen_fp16)],
    ids=["bf16", "fp16"],
)
def test_widening_equals_torch(torch_dtype: torch.dtype, widen: object) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(patterns.view(np.int16)).view(torch_dtype).to(torch.float32).numpy()
    np.testing.assert_array_equal(widen(patterns), expected)  # type: ignore[operator]
    assert np.array_equal(np.signbit(widen(patterns)), np.signbit(expected))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("fmt", "rounded", "widen"),
    [
        (BF16, arithmetic.round_to_bf16_stochastic, arithmetic.widen_bf16),
        (FP16, arithmetic.round_to_fp16_stochastic, arithmetic.widen_fp16),
    ],
    ids=["bf16", "fp16"],
)
def test_stochastic_rounding_equals_rationals(fmt: Format, rounded: object, widen: object) -> None:
    random = np.random.default_rng(11)
    scales = np.array([1.0, 1e-4, 1e-5, 1e-6, 3e-8, 1e-10, 60000.0, 3e38, 1e-39, 1e-44])
    y = np.clip(random.standard_normal((400, scales.size)) * scales, -3.4e38, 3.4e38).reshape(-1)
    edges = [65504, 65535.99, 65536, 2.0**-24, 2.0**-25, 2.0**-14, 2.0**-14 - 2.0**-38, 3.38953139e38]
    y = np.concatenate((y, edges, np.negative(edges))).astype(np.float32)
    y = y[y != 0]
    for random_bits in (
        random.integers(0, 2**16, y.size).astype(np.uint16),
        np.full(y.size, 0, np.uint16),
        np.full(y.size, 0xFFFF, np.uint16),
    ):
        got = widen(rounded(y, random_bits))  # type: ignore[operator]
        expected = np.array(
            [fmt.stochastic(Fraction(float(v)), int(r)) for v, r in zip(y, random_bits, strict=True)]
        )
        np.testing.assert_array_equal(got.astype(np.float64), expected)
        assert np.array_equal(np.signbit(got), np.signbit(y))


@pytest.mark.parametrize(
    "rounded", [arithmetic.round_to_bf16_stochastic, arithmetic.round_to_fp16_stochastic]
)
def test_stochastic_rounding_passes_specials(rounded: object) -> None:
    y = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0], dtype=np.float32)
    got = rounded(y, np.full(5, 0xFFFF, np.uint16))  # type: ignore[operator]
    infinity = 0x7F80 if rounded is arithmetic.round_to_bf16_stochastic else 0x7C00
    assert got[[0, 1, 3, 4]].tolist() == [infinity, infinity | 0x8000, 0, 0x8000]
    assert got[2] & 0x7FFF > infinity


def test_stochastic_rounding_is_fair() -> None:
    """Over all 2^16 random bits the mean is y itself, to 2^-16 of a unit in the last place."""
    every = np.arange(2**16, dtype=np.uint16)
    for y, unit in ((np.float32(1.2345), 2.0**-7), (np.float32(-3e-7), None)):
        values = np.full(2**16, y, dtype=np.float32)
        if unit is not None:
            mean = (
                arithmetic.widen_bf16(arithmetic.round_to_bf16_stochastic(values, every))
                .astype(np.float64)
                .mean()
            )
            assert mean == float(y)
        mean = (
            arithmetic.widen_fp16(arithmetic.round_to_fp16_stochastic(values, every))
            .astype(np.float64)
            .mean()
        )
        assert abs(mean - float(y)) <= 2.0**-16 * 2.0**-24 if unit is None else mean == float(y)
