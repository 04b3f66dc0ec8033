"""Exact facts of the Gaussian transform: radii, angle lattice, tails, and the figures of noise_domain.py."""

from __future__ import annotations

import math

import noise_domain
import numpy as np
import pytest
from noise_samples import SEED, transformed
from numpy.typing import NDArray
from scipy import special
from thresholds import limit

NUM_RADII = 1 << 17  # the low 17 bits of a word
NUM_ANGLES = 1 << 15  # the high 15 bits; the low bits only shift their lattice


def radius_table() -> NDArray[np.float64]:
    """The radius of every low 17 bits k: the length of (even, odd), exact to an fp32 rounding, at the angle
    k 2^-31 pi.
    """
    even, odd = transformed(np.arange(NUM_RADII, dtype=np.uint32))
    return np.hypot(even.astype(np.float64), odd.astype(np.float64))


def test_radius_table() -> None:
    """r^2 is -2 ln u, u = (k + 1/2) 2^-17, to 2e-5 (the polynomial for ln u: 1.9e-5) and a relative 4e-5
    (the square root's step), so E[r^2] and E[r^4] of an exponential, 2 and 8, come out to well below that;
    they are the domain's E[even^2] + E[odd^2] and E[even^4] + E[odd^4] + 2 E[even^2 odd^2].
    """
    radius = radius_table()
    square = -2.0 * np.log((np.arange(NUM_RADII) + 0.5) / NUM_RADII)
    assert (np.abs(radius**2 - square) < 2e-5 + 4e-5 * square).all()
    assert (np.diff(radius) < 0).all()
    # Angles other than 0 move the largest |z| by their own rounding, 5e-6 relative at most.
    assert radius.max() == pytest.approx(noise_domain.LARGEST, rel=5e-6)
    assert radius.min() == pytest.approx(noise_domain.SMALLEST_RADIUS, abs=1e-7)
    assert abs(np.mean(radius**2) - 2.0) < 2e-6
    assert abs(np.mean(radius**4) - 8.0) < 4e-4
    # cos^2 + sin^2 averages to 1 - 5e-7.
    moments = noise_domain.EVEN_MOMENTS + noise_domain.ODD_MOMENTS
    assert np.mean(radius**2) == pytest.approx(moments[1], rel=1e-6)
    assert np.mean(radius**4) == pytest.approx(moments[3] + 2.0 * noise_domain.MEAN_SQUARE_PRODUCT, rel=2e-6)


@pytest.mark.slow
def test_angle_lattice_averages_to_zero() -> None:
    """For each radius the 2^15 angles are a full lattice of the circle, on which sine and cosine average to
    0. So the mean of z cannot exceed the largest error of z, 5e-6 r, and does not come near it. Every 64th
    radius, and both ends.
    """
    radii = np.unique(np.concatenate([np.arange(0, NUM_RADII, 64), [1, 2, 3, NUM_RADII - 2, NUM_RADII - 1]]))
    high = np.arange(NUM_ANGLES, dtype=np.uint32) << np.uint32(17)
    table = radius_table()
    for k in radii:
        words = high | np.uint32(k)
        even, odd = transformed(words)
        angle = words.view(np.int32) * (math.pi * 2.0**-31)
        assert np.abs(even - table[k] * np.cos(angle)).max() < 5e-6 * table[k]
        assert np.abs(odd - table[k] * np.sin(angle)).max() < 5e-6 * table[k]
        assert abs(even.mean(dtype=np.float64)) < 5e-7 * table[k]
        assert abs(odd.mean(dtype=np.float64)) < 5e-8 * table[k]


def test_tails_are_exact() -> None:
    """|z| > 3 needs r > 3, u < exp(-9/2) = 0.0111, k < 1457: all angles of the lowest 2048 radii hold every
    such word.
    """
    assert radius_table()[2048:].max() < min(noise_domain.TAIL_COUNTS)
    counts = {threshold: np.zeros(2, dtype=np.int64) for threshold in noise_domain.TAIL_COUNTS}
    low = np.arange(2048, dtype=np.uint32)
    for first in range(0, NUM_ANGLES, 1 << 10):
        high = np.arange(first, first + (1 << 10), dtype=np.uint32) << np.uint32(17)
        even, odd = transformed((high[:, None] | low).ravel())
        for threshold, count in counts.items():
            count += [np.count_nonzero(np.abs(z) > threshold) for z in (even, odd)]
    assert {
        threshold: tuple(count.tolist()) for threshold, count in counts.items()
    } == noise_domain.TAIL_COUNTS


def test_tails_against_the_normal_distribution() -> None:
    """How far the tail probabilities lie from those of N(0, 1): the cells of the radius get visible towards
    the end.
    """
    for threshold, relative in ((3.0, 1e-4), (4.0, 1e-3), (4.5, 0.02), (4.9, 0.01)):
        ratio = noise_domain.tail_probability(threshold) / noise_domain.normal_tail(threshold)
        assert abs(ratio - 1.0) < relative


def test_domain_figures() -> None:
    """noise_domain.py's moments and distance to N(0, 1) from 2^26 words: two random ones of each cell of
    128 neighbours.

    Means over cells are unbiased, and half the mean squared difference of two words of a cell is its
    variance, so the standard error comes from the sample itself: limit(20) of them are allowed, and 1e-9
    for the digits that the figures leave out.
    """
    random = np.random.default_rng(SEED)
    num_cells = noise_domain.NUM_WORDS // 128
    means = np.zeros((2, 7))
    variances = np.zeros((2, 7))
    histogram = np.zeros((2, 1 << 16), dtype=np.int64)
    edges = np.linspace(-5.0, 5.0, (1 << 16) + 1)
    step = 1 << 18
    for first in range(0, num_cells, step):
        cells = np.arange(first, first + step, dtype=np.uint32) << np.uint32(7)
        draws = [transformed(cells | random.integers(0, 128, step, dtype=np.uint32)) for _ in range(2)]
        pairs = [[z.astype(np.float64) for z in draw] for draw in draws]
        for half in range(2):
            x, y = pairs[0][half], pairs[1][half]
            fx, fy = x.copy(), y.copy()
            for m in range(6):
                means[half, m] += (fx.sum() + fy.sum()) / 2
                variances[half, m] += np.square(fx - fy).sum() / 2
                fx *= x
                fy *= y
            for z in (x, y):
                histogram[half] += np.bincount(((z + 5.0) * 6553.6).astype(np.int64), minlength=1 << 16)
        products = [draw[0] * draw[1] for draw in pairs]
        for half, power in enumerate((1, 2)):
            fx, fy = products[0] ** power, products[1] ** power
            means[half, 6] += (fx.sum() + fy.sum()) / 2
            variances[half, 6] += np.square(fx - fy).sum() / 2
    means /= num_cells
    errors = np.sqrt(variances / num_cells / (2 * num_cells))
    figures = np.array(
        [
            [*noise_domain.EVEN_MOMENTS, noise_domain.MEAN_PRODUCT],
            [*noise_domain.ODD_MOMENTS, noise_domain.MEAN_SQUARE_PRODUCT],
        ]
    )
    assert (np.abs(means - figures) < limit(20) * errors + 1e-9).all()
    for counts in histogram:
        distance = np.abs(np.cumsum(counts) / counts.sum() - special.ndtr(edges[1:])).max()
        # The sample's own distance to the domain is far below the square root of 1 / 2^26, because it is
        # stratified.
        assert distance < noise_domain.KOLMOGOROV_DISTANCE + 1e-6
