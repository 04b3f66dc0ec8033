"""The distribution of Gaussian noise: moments, shape and tails of 2^26 elements against N(0, 1)."""

from __future__ import annotations

import math

import noise_checks
import noise_domain
import numpy as np
import pytest
from noise_samples import long_sample
from thresholds import Judge


def test_moments(judge: Judge) -> None:
    z = long_sample()
    both = (noise_domain.EVEN_MOMENTS + noise_domain.ODD_MOMENTS) / 2
    judge(
        "moments",
        [
            *noise_checks.moments("even", np.ascontiguousarray(z[0::2]), noise_domain.EVEN_MOMENTS),
            *noise_checks.moments("odd", np.ascontiguousarray(z[1::2]), noise_domain.ODD_MOMENTS),
            *noise_checks.moments("all", z, both),
        ],
    )


def test_products_of_even_and_odd(judge: Judge) -> None:
    z = long_sample()
    judge("products even x odd", noise_checks.cross_moments(z[0::2], z[1::2]))


@pytest.mark.slow
def test_distribution_function(judge: Judge) -> None:
    z = long_sample()[: 1 << 24]
    judge(
        "distribution function",
        [
            *noise_checks.distribution_function("even", z[0::2]),
            *noise_checks.distribution_function("odd", z[1::2]),
        ],
    )


@pytest.mark.slow
def test_equiprobable_bins(judge: Judge) -> None:
    z = long_sample()[: 1 << 25]
    judge(
        "1024 equiprobable bins",
        [*noise_checks.equiprobable_bins("even", z[0::2]), *noise_checks.equiprobable_bins("odd", z[1::2])],
    )


def test_tail_counts(judge: Judge) -> None:
    judge("tail counts", noise_checks.tails(long_sample()))


def test_the_end_is_reached_and_not_passed() -> None:
    """|z| <= 4.9954 = sqrt(-2 ln 2^-18), the radius of the lowest of 2^17 cells.

    Of N(0, 1) the share 5.88e-7 lies beyond: 39 of these 2^26 samples, whose largest would exceed the end
    with probability 1 - exp(-39). Beyond 4.9 lie, by the exact counts of the domain, 64 of them: none
    would, with probability exp(-64).
    """
    largest = float(np.abs(long_sample()).max())
    assert largest <= noise_domain.LARGEST + 1e-8
    assert largest > 4.9
    assert abs(noise_domain.LARGEST - math.sqrt(2.0 * math.log(2.0**18))) < 1e-4
    assert abs(noise_domain.normal_tail(noise_domain.LARGEST) - 5.88e-7) < 1e-9
