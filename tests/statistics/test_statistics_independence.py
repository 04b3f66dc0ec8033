"""Independence of Gaussian noise: neighbouring elements, groups, streams and seeds, also ones that differ
in one bit.
"""

from __future__ import annotations

import noise_checks
import numpy as np
import pytest
from noise_samples import SEED, ZERO_SEED, gaussian, long_sample
from thresholds import Check, Judge

from fedkseed_kernels.contract import derived

GROUP = 8  # elements that share one Philox call
FLIP_SAMPLES = 1 << 20  # of each noise in a pair that differs in one bit


def test_elements_of_a_group_and_of_neighbouring_groups(judge: Judge) -> None:
    """Every position of a group against every other, and against every position 1, 2 and 16 groups on."""
    groups = long_sample()[: 1 << 22].reshape(-1, GROUP)
    checks = noise_checks.column_correlations("in one group", groups)
    for distance in (1, 2, 16):
        checks += noise_checks.column_correlations(
            f"{distance} groups on", groups[:-distance], groups[distance:]
        )
    judge("positions in groups", checks)


def test_lags(judge: Judge) -> None:
    z = long_sample()[: 1 << 22]
    judge("lags 1..16, 128", noise_checks.lags("lags", z, [*range(1, 17), 128]))


def test_joint_cells_of_neighbours(judge: Judge) -> None:
    groups = long_sample()[: 1 << 24].reshape(-1, GROUP)
    pairs = {
        "both of a word": (groups[:, 0::2].ravel(), groups[:, 1::2].ravel()),
        "neighbouring words": (groups[:, 1:-1:2].ravel(), groups[:, 2::2].ravel()),
        "neighbouring groups": (groups[:-1, -1], groups[1:, 0]),
    }
    judge("cells of neighbours", noise_checks.joint_bins(pairs))


@pytest.mark.slow
def test_streams(judge: Judge) -> None:
    """64 streams of one seed, all pairs: the first 32, and 32 as far apart as a wire format allows."""
    streams = [*range(32), *(2**32 - 1 - 0x07654321 * i for i in range(32))]
    z = np.stack([gaussian(1 << 16, SEED, stream) for stream in streams])
    judge("64 streams, all pairs", noise_checks.column_correlations("streams", np.ascontiguousarray(z.T)))


def test_seeds(judge: Judge) -> None:
    """128 seeds, all pairs: 0, 1, 2, ..., and negative ones, which are their two's complements."""
    z = np.stack([gaussian(1 << 16, seed) for seed in [*range(64), *range(-64, 0)]])
    judge("128 small seeds, all pairs", noise_checks.column_correlations("seeds", np.ascontiguousarray(z.T)))


@pytest.mark.slow
def test_seeds_of_a_pool(judge: Judge) -> None:
    """Candidate seeds are unlike one another (4096 of 2^64 collide with probability 4.5e-13), and so is
    their noise.
    """
    pool = derived.candidate_seeds(2024, 4096)
    assert np.unique(pool).size == pool.size
    z = np.stack([gaussian(1 << 15, int(seed)) for seed in pool[:256]])
    judge(
        "256 seeds of a pool, all pairs", noise_checks.column_correlations("seeds", np.ascontiguousarray(z.T))
    )


def test_a_rebuild_sums_independent_seeds(judge: Judge) -> None:
    """K^(-1/2) sum of z(s_k), K = 4096 seeds of a pool, is N(0, 1) too: one repeated seed in 16 would raise
    its variance by 12 %.
    """
    num, num_seeds = 1 << 13, 4096
    total = np.zeros(num)
    for seed in derived.candidate_seeds(7, num_seeds):
        total += gaussian(num, int(seed))
    total /= np.sqrt(num_seeds)
    # E[z^2] and E[z^4] of the sum: variances add, and the excess kurtosis shrinks by K; both biases are
    # below 1e-6.
    normal = np.array([0.0, 1.0, 0.0, 3.0, 0.0, 15.0])
    judge(
        "sum of 4096 seeds",
        [
            *noise_checks.moments("sum", total, normal),
            *noise_checks.distribution_function("sum", total),
        ],
    )


@pytest.mark.parametrize("seed", [ZERO_SEED, SEED], ids=["zero", "random"])
def test_seeds_that_differ_in_one_bit(judge: Judge, seed: int) -> None:
    others = (gaussian(FLIP_SAMPLES, seed ^ 1 << bit) for bit in range(64))
    judge(
        f"one of 64 bits of seed {seed:#x}",
        noise_checks.correlations("seed bits", gaussian(FLIP_SAMPLES, seed), others),
    )


def test_streams_that_differ_in_one_bit(judge: Judge) -> None:
    others = (gaussian(FLIP_SAMPLES, SEED, stream=1 << bit) for bit in range(32))
    judge(
        "one of 32 stream bits",
        noise_checks.correlations("stream bits", gaussian(FLIP_SAMPLES, SEED), others),
    )


def test_elements_that_differ_in_one_bit(judge: Judge) -> None:
    """Element e against e ^ 2^b, for every bit that numbers a group: 3..62. Bits 35 and up are the
    counter's third word.
    """
    double = gaussian(2 * FLIP_SAMPLES, SEED)
    base = double[:FLIP_SAMPLES]
    checks: list[Check] = []
    for bit in range(3, 21):
        halves = double.reshape(-1, 2, 1 << bit)
        checks += noise_checks.correlations(f"bit {bit}", halves[:, 0].ravel(), [halves[:, 1].ravel()])
    high = (gaussian(FLIP_SAMPLES, SEED, offset=1 << bit) for bit in range(21, 63))
    checks += noise_checks.correlations("bits 21..62", base, high)
    last = gaussian(FLIP_SAMPLES, SEED, offset=2**63 - FLIP_SAMPLES)
    checks += noise_checks.correlations("the last elements", base, [last])
    judge("one of 60 element bits", checks)


def test_seed_and_stream_are_not_interchangeable(judge: Judge) -> None:
    """(seed a, stream b) against (seed b, stream a), against seed a + b, and against seed a + 2^32 b: key
    and counter do not mix.
    """
    n = FLIP_SAMPLES
    checks: list[Check] = []
    for a, b in ((1, 2), (7, 1), (3, 1 << 31)):
        others = (gaussian(n, b, a), gaussian(n, a + b), gaussian(n, a | b << 32), gaussian(n, a))
        checks += noise_checks.correlations(f"seed {a}, stream {b}", gaussian(n, a, b), others)
    judge("seed and stream swapped", checks)
