"""The reference against facts that do not come from it: the page's sentences, scalar loops, fp64 formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from rationals import FP32

from fedkseed_kernels.contract import derived, reference, sums

ANY = np.arange(5, 300, dtype=np.uint64)


def z_by_hand(seed: int, stream: int, element: int, family: str) -> float:
    """Sections 3 to 5 for one element, as the page says it."""
    tag, shift = (1, 3) if family == "gaussian" else (2, 7)
    group = element >> shift
    counter = np.array([group % 2**32, stream, group >> 32, tag], dtype=np.uint32)
    key = np.array([seed % 2**32, (seed % 2**64) >> 32], dtype=np.uint32)
    words = reference.philox4x32_10(counter, key)
    if family == "rademacher":
        lane = element % 128
        return -1.0 if int(words[lane // 32]) >> lane % 32 & 1 else 1.0
    j, is_odd = divmod(element % 8, 2)
    return float(reference.normals_from_words(words[j : j + 1])[is_odd][0])


@pytest.mark.parametrize("family", reference.FAMILIES)
@pytest.mark.parametrize("first", [0, 3, 2**31 - 4, 2**35 - 5, 2**39 - 130, 2**62 + 1, 2**63 - 9])
def test_elements_by_hand(family: str, first: int) -> None:
    noise = getattr(reference, family)
    elements = [first + step for step in range(9)]
    for seed, stream in ((0, 0), (-1, 2**32 - 1), (2**63 + 12345, 7)):
        expected = [z_by_hand(seed, stream, element, family) for element in elements]
        assert noise(seed, stream, elements).tolist() == expected


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_noise_depends_on_the_element_only(family: str) -> None:
    noise = getattr(reference, family)
    whole = noise(3, 1, np.arange(2 * reference.CHUNK_ELEMENTS + 77))
    random = np.random.default_rng(20)
    some = random.integers(0, whole.size, (31, 9))
    np.testing.assert_array_equal(noise(3, 1, some), whole[some])
    np.testing.assert_array_equal(noise(3, 1, some.astype(np.uint64)[::-1]), whole[some][::-1])
    np.testing.assert_array_equal(noise(3, 1, np.arange(5, whole.size - 3)), whole[5:-3])
    np.testing.assert_array_equal(noise(3, 1, np.arange(100)[::-1]), whole[99::-1])
    assert noise(3, 1, np.arange(0)).shape == (0,)


def test_seeds_are_taken_modulo_2_to_64() -> None:
    for seed, same in ((-1, 2**64 - 1), (2**64, 0), (-(2**63), 2**63)):
        np.testing.assert_array_equal(reference.gaussian(seed, 0, ANY), reference.gaussian(same, 0, ANY))


@pytest.mark.parametrize(("seed", "stream"), [(1, 0), (2**32, 0), (0, 1), (2**63, 0)])
def test_each_input_matters(seed: int, stream: int) -> None:
    assert (reference.gaussian(seed, stream, ANY) != reference.gaussian(0, 0, ANY)).mean() > 0.9


def test_transform_is_box_muller() -> None:
    words = np.random.default_rng(21).integers(0, 2**32, 200_000, dtype=np.uint32)
    even, odd = reference.normals_from_words(words)
    radius = np.sqrt(-2 * np.log(((words & 0x1FFFF) + 0.5) * 2.0**-17))
    angle = np.pi * words.view(np.int32) * 2.0**-31
    assert np.abs(even - radius * np.cos(angle)).max() < 2.5e-3
    assert np.abs(odd - radius * np.sin(angle)).max() < 2.5e-3
    assert np.abs(np.hypot(even.astype(np.float64), odd) - radius).max() < 2.5e-3


def test_range_of_the_radius() -> None:
    """The page: r is in [0.002331, 4.9954]. Angle 0 needs the word's top bits 0, and there even is r."""
    even, odd = reference.normals_from_words(np.arange(2**17, dtype=np.uint32))
    r = np.hypot(even.astype(np.float64), odd)
    assert 0.002331 <= r.min() < 0.002332
    assert 4.9953 < r.max() <= 4.9954


def test_sum_by_rationals() -> None:
    seeds, coeffs = [4, 5, 6, 7], [0.3, -0.0, 1e-3, -0.7]
    acc = reference.accumulate(seeds, coeffs, 2, ANY)
    for i in range(0, ANY.size, 13):
        expected = 0.0
        for seed, c in zip(seeds, coeffs, strict=True):
            z = reference.gaussian(seed, 2, ANY[i : i + 1])[0]
            if c:
                exact = Fraction(float(np.float32(c))) * Fraction(float(z)) + Fraction(expected)
                expected = FP32.nearest(exact)
        assert float(acc[i]) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sign_of_zero_sums(dtype: str) -> None:
    """Section 6.2: no term gives -0 on both sides, an exact cancellation +0 on both, an underflow mirrors."""
    negative_zero, elements = np.full(8, -0.0, dtype=dtype), np.arange(8)
    tiny = 2.0**-149 if dtype == "float32" else 2.0**-1074
    for seeds, coeffs, alpha in (([], [], 0.5), ([3, 3], [0.5, -0.5], 1.0), ([3], [tiny], 1.0)):
        sides = reference.seed_axpy_pair_array(
            negative_zero, elements, seeds, coeffs, dtype=dtype, alpha=alpha, family="gaussian"
        )
        for side, sign in zip(sides, (1, -1), strict=True):
            if not seeds:
                assert np.signbit(side).all()
            elif len(seeds) == 2:
                assert not np.signbit(side).any()
                assert not side.any()
            else:
                z = reference.gaussian(3, 0, elements)
                assert np.array_equal(np.signbit(side), np.signbit(sign * z))
                assert (side == 0).any()


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("rounding", reference.ROUNDINGS)
@pytest.mark.parametrize(("seeds", "coeffs"), [([], []), ([1, 2], [0.0, -0.0])])
def test_nothing_to_do_keeps_bytes(dtype: str, rounding: str, seeds: list[int], coeffs: list[float]) -> None:
    patterns = np.random.default_rng(22).integers(0, 256, 80, dtype=np.uint8)
    patterns[-2:] = 0xFF  # a NaN with a payload in each dtype
    storage = {"float32": np.float32, "float64": np.float64}.get(dtype, np.uint16)
    stored = patterns.view(storage)
    new = reference.seed_axpy_array(
        stored, np.arange(stored.size), seeds, coeffs, dtype=dtype, rounding=rounding, rounding_seed=1
    )
    assert new.tobytes() == stored.tobytes()
    assert new is not stored


def test_coefficients_that_round_to_zero_are_skipped() -> None:
    assert sums.kept_terms([1, 2], [1e-60, 1e-45], fp64=False) == [(2, np.float32(1e-45))]
    assert [seed for seed, _ in sums.kept_terms([1, 2], [1e-60, 1e-45], fp64=True)] == [1, 2]


def test_rounding_bits_by_hand() -> None:
    elements = np.arange(2**35 - 6, 2**35 + 6, dtype=np.uint64)
    words = reference.group_words(9, 4, elements >> np.uint64(3), reference.TAG_ROUNDING)
    expected = [
        int(words[i, int(e) % 8 // 2]) >> (16 if int(e) % 2 else 0) & 0xFFFF for i, e in enumerate(elements)
    ]
    assert reference.rounding_bits(9, 4, elements).tolist() == expected


def test_view_elements_are_those_of_the_full_tensor() -> None:
    full = np.arange(7 * 5 * 11).reshape(7, 5, 11)
    np.testing.assert_array_equal(
        reference.view_elements((2, 3, 4), full.shape, (5, 1, 6)), full[5:7, 1:4, 6:10]
    )
    assert reference.view_elements((), (), ()) == 0
    last = reference.view_elements((1, 1), (2**31, 2**31), (2**31 - 1, 2**31 - 1))
    assert int(last[0, 0]) == 2**62 - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference.gaussian(0, 0, [-1]), "element indices"),
        (lambda: reference.gaussian(0, 0, np.array([2**63], dtype=np.uint64)), "element indices"),
        (lambda: reference.gaussian(0, 0, [0.5]), "element indices"),
        (lambda: reference.gaussian(0, 2**32, [0]), "stream"),
        (lambda: reference.accumulate([1], [1.0, 2.0], 0, [0]), "one coefficient for each seed"),
        (lambda: reference.accumulate([1], [np.nan], 0, [0]), "finite"),
        (lambda: reference.accumulate([1], [1e39], 0, [0]), "finite"),
        (lambda: reference.accumulate([1], [1.0], 0, [0], family="cauchy"), "gaussian, rademacher"),
        (lambda: reference.view_elements((2,), (3,), (2,)), "view within"),
        (lambda: derived.words(0, -1, [0]), "purpose"),
        (lambda: derived.words(0, 0, [-1]), "indices"),
        (lambda: derived.draw([0.0, 0.0], [0.5]), "positive"),
        (lambda: derived.draw([0.5, np.nan], [0.5]), "finite"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_derived_values_by_hand() -> None:
    for index in (0, 77, 2**32 + 5, 2**64 - 1):
        counter = np.array([index % 2**32, 3, index >> 32, 4], dtype=np.uint32)
        words = [int(w) for w in reference.philox4x32_10(counter, np.array([5, 6], dtype=np.uint32))]
        arguments = (5 + 6 * 2**32, derived.PURPOSE_ROUNDING_SEEDS, np.array([index], dtype=np.uint64))
        assert derived.words(*arguments).tolist() == [words]
        assert derived.seeds(*arguments).tolist() == [words[0] + words[1] * 2**32]
        uniform = math.ldexp((words[0] >> 5) * 2**26 + (words[1] >> 6), -53)
        assert derived.uniforms(*arguments).tolist() == [uniform]


def test_candidate_seeds_are_a_prefix() -> None:
    seeds = derived.candidate_seeds(-3, 4096)
    assert len(set(seeds.tolist())) == 4096
    np.testing.assert_array_equal(derived.candidate_seeds(2**64 - 3, 100), seeds[:100])


def test_draw_by_hand() -> None:
    probabilities = np.random.default_rng(23).random(1000)
    probabilities[::7] = 0
    probabilities /= probabilities.sum()
    uniforms = derived.uniforms(1, derived.PURPOSE_SCHEDULE, np.arange(300))
    for uniform, got in zip(uniforms, derived.draw(probabilities, uniforms), strict=True):
        running, expected = 0.0, 0
        for expected, p in enumerate(probabilities):  # noqa: B007
            running += float(p)
            if running > uniform:
                break
        assert got == expected
    assert derived.draw([0.25, 0.0, 0.75, 0.0], [0.0, 0.25, 1 - 2**-53]).tolist() == [0, 2, 2]
    assert derived.draw([0.0, 0.3, 0.6, 0.0], [0.95]).tolist() == [2]
