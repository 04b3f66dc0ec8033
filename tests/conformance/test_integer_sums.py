"""Sums of Rademacher noise (contract section 6.3): exact, so in any order; each rule met where it decides."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rationals import FP32, FP64

import fedkseed_kernels as fk
from fedkseed_kernels.conformance import __main__ as conformance
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.conformance.checks import Target, poisoned, stored_of, tensor_of
from fedkseed_kernels.contract import reference, sums

TARGETS, _ = conformance.find_targets()
all_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
all_dtypes = pytest.mark.parametrize("dtype", reference.DTYPES)
both_formats = pytest.mark.parametrize("fp64", [False, True], ids=["fp32", "fp64"])
ELEMENTS = np.arange(2**39 - 40, 2**39 + 200, dtype=np.uint64)


def coefficients(count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Magnitudes over 40 binary orders, some too small to count."""
    values = random.standard_normal(count) * 2.0 ** random.uniform(-40, 0, count)
    values[random.random(count) < 0.1] = 0
    values[random.random(count) < 0.1] = 1e-40
    return values


def by_rationals(
    seeds: list[int], coeffs: list[Fraction], element: int, *, smallest: Fraction, bits: int, fmt: Any
) -> tuple[float, Fraction, Fraction]:
    """acc of one element as the page says it, the plain sum, and the bound of their distance."""
    terms = [(s, c) for s, c in zip(seeds, coeffs, strict=True) if abs(c) >= smallest]
    e = 0
    largest = max(abs(c) for _, c in terms)
    while largest >= Fraction(2) ** e:
        e += 1
    while largest < Fraction(2) ** (e - 1):
        e -= 1
    log2 = 0
    while len(terms) > 2**log2:
        log2 += 1
    s = bits - log2 - e
    total, plain = 0, Fraction(0)
    for seed, c in terms:
        z = int(reference.rademacher(seed, 3, [element])[0])
        total += z * round(c * Fraction(2) ** s)  # round() of a fraction goes to even
        plain += z * c
    acc = fmt.nearest(Fraction(fmt.nearest(Fraction(total))) / Fraction(2) ** s)
    return acc, plain, len(terms) * Fraction(2) ** (log2 + e - bits - 1)


@both_formats
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 33])
def test_reference_by_rationals(fp64: bool, count: int) -> None:
    random = np.random.default_rng(40 + count)
    number, fmt = (np.float64, FP64) if fp64 else (np.float32, FP32)
    coeffs = coefficients(count, random)
    coeffs[0] = -0.3
    seeds = random.integers(-(2**63), 2**63, count).tolist()
    acc = reference.accumulate(seeds, coeffs, 3, ELEMENTS, "rademacher", fp64)
    exact = [Fraction(float(number(c))) for c in coeffs]
    for i in range(0, ELEMENTS.size, 17):
        expected, plain, bound = by_rationals(
            seeds,
            exact,
            int(ELEMENTS[i]),
            smallest=Fraction(2) ** (-960 if fp64 else -96),
            bits=62 if fp64 else 30,
            fmt=fmt,
        )
        assert float(acc[i]) == expected
        assert abs(Fraction(expected) - plain) <= bound + abs(plain) * Fraction(2) ** (-52 if fp64 else -23)


@both_formats
def test_integers_at_their_limits(fp64: bool) -> None:
    bits = 62 if fp64 else 30
    largest = float(np.finfo(np.float64 if fp64 else np.float32).max)
    tiny = sums.SUM_SMALLEST[fp64]
    # Rounding up to the limit itself, ties to even either way, and what is below half.
    assert sums.integer_terms([largest], fp64)[0][0] == round(
        Fraction(largest) / 2 ** (1024 - bits if fp64 else 128 - bits)
    )
    for count, log2 in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (2**10 + 1, 11)):
        integers, shift = sums.integer_terms([1.0] * count, fp64)
        assert shift == bits - log2 - 1
        assert set(integers) == {2 ** (bits - log2 - 1)}
        assert sum(integers) <= 2**bits
    unit = 2.0 ** -(bits - 3)  # 1, among three or four terms
    integers, _ = sums.integer_terms([1.0, unit / 2, 1.5 * unit, -2.5 * unit], fp64)
    assert integers[1:] == [0, 2, -2]
    assert sums.integer_terms([largest, tiny], fp64)[0][1] == 0
    assert sums.integer_terms([tiny], fp64)[0] == [2 ** (bits - 1)]


@both_formats
def test_which_terms_count(fp64: bool) -> None:
    smallest = sums.SUM_SMALLEST[fp64]
    below = float(np.nextafter(smallest, 0) if fp64 else np.nextafter(np.float32(smallest), np.float32(0)))
    kept = sums.kept_terms([1, 2, 3, 4], [smallest, -smallest, below, -below], fp64, "rademacher")
    assert [seed for seed, _ in kept] == [1, 2]


@pytest.mark.few
@all_dtypes
@all_targets
@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 130])
def test_numbers_of_terms(target: Target, dtype: str, count: int) -> None:
    """Fewer terms than lanes, as many, more; the groups run past 2^32."""
    random = np.random.default_rng(count)
    coeffs = coefficients(count, random)
    seeds = random.integers(-(2**63), 2**63, count).tolist()
    weights = _weights(2309, dtype)
    first = 2**39 - 1100
    want = reference.seed_axpy_array(
        weights,
        np.uint64(first) + np.arange(weights.size, dtype=np.uint64),
        seeds,
        coeffs,
        dtype=dtype,
        stream=1,
        alpha=0.9,
        family="rademacher",
    )
    out = poisoned(weights.shape, dtype)
    with target.forced():
        fk.seed_axpy(
            [tensor_of(weights, dtype)],
            seeds,
            coeffs.tolist(),
            out=[out],
            streams=[1],
            offsets=[first],
            alpha=0.9,
            family="rademacher",
        )
    assert golden.same_value(stored_of(out), want, dtype).all()


@all_dtypes
@all_targets
def test_any_order_gives_the_same_bits(target: Target, dtype: str) -> None:
    random = np.random.default_rng(41)
    seeds, coeffs = random.integers(-(2**63), 2**63, 71), coefficients(71, random)
    weights = _weights(1003, dtype)
    found = set()
    for _ in range(4):
        order = random.permutation(71)
        outs = [poisoned(weights.shape, dtype) for _ in range(2)]
        with target.forced():
            fk.seed_axpy_pair(
                [tensor_of(weights, dtype)],
                seeds[order],
                coeffs[order],
                out_plus=[outs[0]],
                out_minus=[outs[1]],
                family="rademacher",
            )
        found.add(b"".join(stored_of(out).tobytes() for out in outs))
    assert len(found) == 1


@all_targets
@pytest.mark.parametrize("coeff", [0.1, -1.7e-28, 3.4e38])
def test_one_term_is_exact(target: Target, coeff: float) -> None:
    z = reference.rademacher(5, 0, np.arange(300))
    outs = [poisoned((300,), "float32") for _ in range(2)]
    with target.forced():
        fk.seed_axpy_pair(
            [torch.zeros(300)], [5], [coeff], out_plus=[outs[0]], out_minus=[outs[1]], family="rademacher"
        )
    np.testing.assert_array_equal(outs[0].numpy(), z * np.float32(coeff))
    np.testing.assert_array_equal(outs[1].numpy(), -z * np.float32(coeff))


@all_targets
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_signs_of_zero(target: Target, dtype: str) -> None:
    """Terms that cancel: +0 on both sides; terms that do not count: the bytes stay, or -0 is added."""
    negative_zero = torch.full((200,), -0.0, dtype=getattr(torch, dtype))
    small = 2.0**-97 if dtype == "float32" else 2.0**-961
    cases: list[tuple[list[int], list[float], float, bool]] = [
        ([3, 3], [0.5, -0.5], 1.0, False),
        ([3], [small], 0.5, True),
        ([3], [small], 1.0, True),
    ]
    for seeds, coeffs, alpha, is_negative in cases:
        outs = [poisoned((200,), dtype) for _ in range(2)]
        with target.forced():
            fk.seed_axpy_pair(
                [negative_zero],
                seeds,
                coeffs,
                alpha=alpha,
                out_plus=[outs[0]],
                out_minus=[outs[1]],
                family="rademacher",
            )
        for out in outs:
            assert not out.any()
            assert bool((torch.signbit(out) == is_negative).all())


def test_too_many_terms_are_refused() -> None:
    seeds = torch.zeros(1, dtype=torch.int64).expand(2**24 + 1)
    coeffs = torch.zeros(1, dtype=torch.float64).expand(2**24 + 1)
    weights = torch.ones(3)
    with pytest.raises(ValueError, match=r"at most 2\^24 terms of rademacher noise, got 16777217"):
        fk.seed_axpy_([weights], seeds, coeffs, family="rademacher")
    with pytest.raises(ValueError, match=r"at most 2\^24 terms"):
        sums.kept_terms([0] * (2**24 + 1), np.zeros(2**24 + 1), False, "rademacher")
    assert weights.tolist() == [1, 1, 1]


def _weights(count: int, dtype: str) -> NDArray[Any]:
    values = np.random.default_rng(42).standard_normal(count) * 0.05
    return values if dtype == "float64" else reference.round_to_nearest(values.astype(np.float32), dtype)
