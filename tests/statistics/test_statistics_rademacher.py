"""Rademacher noise: balance, runs, lags, patterns, and independence between streams and seeds."""

from __future__ import annotations

import bit_checks
import noise_checks
import numpy as np
from noise_samples import SEED, ZERO_SEED, gaussian, rademacher
from thresholds import Check, Judge

GROUP = 128  # elements that share one Philox call
NUM = 1 << 24
FLIP_SAMPLES = 1 << 20


def test_one_stream(judge: Judge) -> None:
    signs = rademacher(NUM, SEED)
    assert np.array_equal(np.unique(signs), [-1.0, 1.0])
    distances = [*range(1, 17), 31, 32, 33, 64, 96, 127, 128, 129, 256]
    judge("Rademacher sequence", bit_checks.sign_sequence(signs, distances))


def test_lanes_of_a_group(judge: Judge) -> None:
    """All pairs of the 128 lanes of one group, and of one with the next group's."""
    bits = (rademacher(NUM, SEED, stream=1) < 0).astype(np.uint8).reshape(-1, GROUP)
    judge("Rademacher lanes", bit_checks.bit_columns("lanes", bits))


def test_streams_seeds_and_elements_that_differ_in_one_bit(judge: Judge) -> None:
    base = rademacher(FLIP_SAMPLES, ZERO_SEED)
    others = {
        "seed": ((1 << bit, 0, 0) for bit in range(64)),
        "stream": ((0, 1 << bit, 0) for bit in range(32)),
        "element": ((0, 0, 1 << bit) for bit in range(20, 63)),
    }
    checks: list[Check] = []
    for name, places in others.items():
        noises = (rademacher(FLIP_SAMPLES, *place) for place in places)
        checks += bit_checks.sign_pairs(f"{name} bit", base, noises)
    judge("Rademacher, one bit changed", checks)


def test_against_gaussian_noise_of_the_same_seed(judge: Judge) -> None:
    """Both families over one seed and stream, group by group: a shared tag would give the Gaussian words'
    bits away.
    """
    signs = rademacher(1 << 22, SEED).reshape(-1, GROUP)
    z = gaussian(signs.shape[0] * 8, SEED).reshape(-1, 8)
    (check,) = noise_checks.column_correlations("sign x z", signs, z)
    # Kinds (z, z) and (z, z^2): a sign is a standardised first factor as it is, and its square is constant.
    judge("Rademacher x Gaussian", [Check("sign x z, sign x z^2", check.sigmas[[0, 3]])])
