"""Checks of noise that claims to be independent N(0, 1): statistics with their standard errors under that
claim.

Every function takes samples, whatever made them, and returns Checks; test_statistics_broken_noise.py feeds
them noise that is wrong in a known way. Arrays are fp32 or fp64, sums are fp64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import noise_domain
import numpy as np
import torch
from numpy.typing import NDArray
from thresholds import (
    Check,
    from_anderson_darling,
    from_binomial,
    from_chi_square,
    from_estimates,
    from_kolmogorov,
    from_log_p,
)

Samples = NDArray[np.floating[Any]]
Doubles = NDArray[np.float64]

# Samples worked on at a time: fp64 temporaries stay in cache.
BLOCK = 1 << 16
MEAN_ABS = float(np.sqrt(2.0 / np.pi))  # E|z|


def _blocks(*arrays: Samples) -> Iterator[list[Doubles]]:
    for start in range(0, arrays[0].size, BLOCK):
        yield [array[start : start + BLOCK].astype(np.float64) for array in arrays]


def dot(x: Doubles, y: Doubles) -> float:
    """sum x y. np.dot would start BLAS threads for every short vector."""
    return float(np.einsum("i,i->", x, y))


def _normal_cdf(z: Samples) -> Doubles:
    values: Doubles = torch.special.ndtr(torch.from_numpy(np.ascontiguousarray(z)).double()).numpy()
    return values


def raw_moments(z: Samples) -> Doubles:
    """Means of z^m, m = 1..6."""
    sums = np.zeros(6)
    for (block,) in _blocks(z):
        power = block.copy()
        for m in range(6):
            sums[m] += power.sum()
            power *= block
    return sums / z.size


def moments(label: str, z: Samples, domain_moments: Doubles) -> list[Check]:
    """Raw moments 1..6, skewness and kurtosis, against N(0, 1).

    Standard errors: the mean of z^m has variance (E z^2m - (E z^m)^2) / n; skewness and kurtosis, of
    samples centred and scaled by their own mean and deviation, have 6 / n and 24 / n (delta method; exact
    up to 1 / n). Their biases follow from the domain's moments.
    """
    n = z.size
    m = raw_moments(z)

    def shape(moments: Doubles) -> Doubles:
        mean, second, third, fourth = moments[:4]
        variance = second - mean**2
        skewness = (third - 3 * mean * second + 2 * mean**3) / variance**1.5
        kurtosis = (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2
        return np.array([skewness, kurtosis])

    normal = noise_domain.NORMAL_MOMENTS
    return [
        from_estimates(
            f"{label} moments",
            m,
            normal,
            np.sqrt(noise_domain.NORMAL_MOMENT_VARIANCES / n),
            domain_moments - normal,
        ),
        from_estimates(
            f"{label} skewness, kurtosis",
            shape(m),
            [0.0, 3.0],
            np.sqrt(np.array([6.0, 24.0]) / n),
            shape(domain_moments) - [0.0, 3.0],
        ),
    ]


def cross_moments(even: Samples, odd: Samples) -> list[Check]:
    """Means of even^a odd^b: 0 or 1 under independence, with variances E z^2a E z^2b - (E z^a E z^b)^2."""
    powers = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
    even_moment = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 6: 15.0}
    bias = {(1, 1): noise_domain.MEAN_PRODUCT, (2, 2): noise_domain.MEAN_SQUARE_PRODUCT - 1.0}
    sums = np.zeros(len(powers))
    for x, y in _blocks(even, odd):
        x_powers, y_powers = {1: x, 2: x * x, 3: x * x * x}, {1: y, 2: y * y, 3: y * y * y}
        sums += [dot(x_powers[a], y_powers[b]) for a, b in powers]
    expected = [even_moment[a] * even_moment[b] for a, b in powers]
    variance = [
        even_moment[2 * a] * even_moment[2 * b] - e * e for (a, b), e in zip(powers, expected, strict=True)
    ]
    return [
        from_estimates(
            "products of both outputs of a word",
            sums / even.size,
            expected,
            np.sqrt(np.array(variance) / even.size),
            [bias.get(power, 0.0) for power in powers],
        )
    ]


def distribution_function(label: str, z: Samples) -> list[Check]:
    """Kolmogorov-Smirnov and Anderson-Darling against N(0, 1)."""
    n = z.size
    u = np.clip(_normal_cdf(np.sort(z)), 1e-300, 1.0 - 2.0**-53)
    rank = np.arange(1, n + 1, dtype=np.float64)
    distance = max(float(np.max(rank / n - u)), float(np.max(u - (rank - 1.0) / n)))
    logs = np.log(u)
    logs += np.log1p(-u)[::-1]
    statistic = -n - dot((2.0 * rank - 1.0) / n, logs)
    bias = noise_domain.KOLMOGOROV_DISTANCE
    return [
        from_kolmogorov(f"{label} Kolmogorov-Smirnov", distance, n, bias),
        from_anderson_darling(f"{label} Anderson-Darling", statistic, n, bias),
    ]


def bins_of(z: Samples, num_bins: int) -> NDArray[np.int64]:
    """Index of the equiprobable bin of N(0, 1) of each sample."""
    scaled = torch.special.ndtr(torch.from_numpy(np.ascontiguousarray(z)).double()).mul_(num_bins)
    indices: NDArray[np.int64] = scaled.long().clamp_(0, num_bins - 1).numpy()
    return indices


def pearson(counts: NDArray[np.int64]) -> float:
    """Pearson's statistic against equal counts."""
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2).sum() / expected)


def equiprobable_bins(label: str, z: Samples, num_bins: int = 1024) -> list[Check]:
    """Chi-square against N(0, 1)."""
    counts = np.zeros(num_bins, dtype=np.int64)
    for start in range(0, z.size, 1 << 22):
        counts += np.bincount(bins_of(z[start : start + (1 << 22)], num_bins), minlength=num_bins)
    noncentrality = z.size * noise_domain.NONCENTRALITY_1024_BINS
    return [from_chi_square(f"{label} chi-square", pearson(counts), num_bins - 1, noncentrality)]


def joint_bins(pairs: Mapping[str, tuple[Samples, Samples]], num_bins: int = 16) -> list[Check]:
    """Chi-square of pairs on num_bins x num_bins equiprobable cells: any dependence, not only correlation."""
    checks = []
    for label, (x, y) in pairs.items():
        cells = bins_of(x, num_bins) * num_bins + bins_of(y, num_bins)
        counts = np.bincount(cells, minlength=num_bins**2)
        noncentrality = x.size * noise_domain.NONCENTRALITY_16_BY_16_BINS
        checks.append(from_chi_square(f"{label} cells", pearson(counts), num_bins**2 - 1, noncentrality))
    return checks


def tails(z: Samples) -> list[Check]:
    """Samples beyond 3, 4, 4.5 and 4.9 on either side; the probabilities are the contract's exact ones."""
    thresholds = sorted(noise_domain.TAIL_COUNTS)
    counts = np.zeros((len(thresholds), 2), dtype=np.int64)
    for start in range(0, z.size, 1 << 22):
        block = z[start : start + (1 << 22)]
        for i, threshold in enumerate(thresholds):
            counts[i] += np.count_nonzero(block > threshold), np.count_nonzero(block < -threshold)
    probabilities = [[noise_domain.tail_probability(threshold) / 2] for threshold in thresholds]
    return [from_binomial("counts beyond 3, 4, 4.5, 4.9", counts, z.size, probabilities)]


# Functions of z whose products are averaged, standardised to mean 0 and variance 1.
def _standardised(z: Samples) -> dict[str, Doubles]:
    value = z.astype(np.float64)
    return {
        "z": value,
        "z^2": (value * value - 1.0) / np.sqrt(2.0),
        "|z|": (np.abs(value) - MEAN_ABS) / np.sqrt(1.0 - MEAN_ABS**2),
    }


KINDS = (("z", "z"), ("z^2", "z^2"), ("|z|", "|z|"), ("z", "z^2"), ("z^2", "z"))


def correlations(label: str, x: Samples, others: Iterable[Samples]) -> list[Check]:
    """Correlations of z, z^2, |z| and of z with z^2 between x and each of some others, one at a time in
    memory.

    The mean of n products f(x) g(y), f and g standardised, x and y independent, has mean 0 and variance 1 /
    n.
    """
    fx = _standardised(x)
    sums = []
    for y in others:
        fy = _standardised(y)
        sums.append([abs(dot(fx[f], fy[g])) for f, g in KINDS])
    return [Check(label, np.array(sums) / np.sqrt(x.size))]


def column_correlations(label: str, x: Samples, y: Samples | None = None) -> list[Check]:
    """The same for columns of x [n, d] against those of y [n, d], or all pairs of columns of x when y is
    None.
    """
    fx = _standardised(x)
    fy = fx if y is None else _standardised(y)
    sigmas = np.stack([np.abs(fx[f].T @ fy[g]) / np.sqrt(len(x)) for f, g in KINDS])
    if y is None:
        # (z^2, z) above the diagonal is (z, z^2) below it.
        rows, columns = np.triu_indices(x.shape[1], 1)
        sigmas = sigmas[:, rows, columns]
    return [Check(label, sigmas)]


def lags(label: str, z: Samples, distances: Sequence[int]) -> list[Check]:
    """Correlations between z_i and z_(i + distance)."""
    f = _standardised(z)
    sums = [
        [abs(dot(f[left][:-d], f[right][d:])) / np.sqrt(z.size - d) for left, right in KINDS]
        for d in distances
    ]
    return [Check(label, np.array(sums))]


def covariance(z: Samples) -> list[Check]:
    """z [m, d], rows from unlike seeds: means, second moments and the spectrum of z^T z / m against the
    identity.

    Off the diagonal an entry has variance 1 / m, on it 2 / m; a mean has 1 / m. The extreme singular values
    of a Gaussian matrix obey P(largest > sqrt(m) + sqrt(d) + t) <= exp(-t^2 / 2) and P(smallest < sqrt(m) -
    sqrt(d) - t) <= exp(-t^2 / 2) (Davidson and Szarek, 2001).
    """
    m, d = z.shape
    value = z.astype(np.float64)
    second = value.T @ value / m
    error = np.full((d, d), 1.0 / np.sqrt(m))
    np.fill_diagonal(error, np.sqrt(2.0 / m))
    upper = np.triu_indices(d)
    singular = np.linalg.svd(value, compute_uv=False)[[0, -1]]
    excess = np.maximum(np.abs(singular - np.sqrt(m)) - np.sqrt(d), 0.0)
    return [
        from_estimates("means", value.mean(axis=0), 0.0, 1.0 / np.sqrt(m)),
        from_estimates("covariance", second[upper], np.eye(d)[upper], error[upper]),
        from_log_p("extreme singular values", -(excess**2) / 2.0),
    ]
