"""Checks of random bits: Philox words, Rademacher signs, stochastic rounding. Functions of samples only,
like noise_checks.

A sum of n independent signs +-1 has variance n, and its tails lie below the normal's (excess kurtosis -2 /
n).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from noise_checks import dot, pearson
from numpy.typing import NDArray
from scipy import stats
from thresholds import Check, from_binomial, from_chi_square

Bits = NDArray[np.uint8]
Words = NDArray[np.uint32]
Signs = NDArray[np.float32]


def bits_of(words: Words) -> Bits:
    """Bits of words uint32 [..., w], least significant first: uint8 [..., 32 w]."""
    little = np.ascontiguousarray(words.astype("<u4", copy=False)).view(np.uint8)
    return np.unpackbits(little, axis=-1, bitorder="little")


def _signs(bits: Bits) -> Signs:
    """Bit 1 is -1. Sums of up to 2^24 of them are exact in fp32."""
    signs: Signs = np.float32(1.0) - np.float32(2.0) * bits.astype(np.float32)
    return signs


def bit_columns(label: str, bits: Bits, other: Bits | None = None) -> list[Check]:
    """Bits [n, d], rows independent: balance of each column, correlation of each pair of columns, of one
    row and of neighbouring rows; with other [n, d], instead, correlations of columns of both.
    """
    signs = _signs(bits)
    n = len(signs)
    if other is not None:
        return [Check(f"{label} pairs", np.abs(signs.T @ _signs(other)).astype(np.float64) / np.sqrt(n))]
    upper = np.triu_indices(bits.shape[1], 1)
    within = np.abs(signs.T @ signs)[upper].astype(np.float64)
    across = np.abs(signs[:-1].T @ signs[1:]).astype(np.float64)
    return [
        from_binomial(f"{label} balance", bits.sum(axis=0, dtype=np.int64), n, 0.5),
        Check(f"{label} pairs in a row", within / np.sqrt(n)),
        Check(f"{label} pairs in neighbouring rows", across / np.sqrt(n - 1)),
    ]


def avalanche(words: Words, changed: Words) -> list[Check]:
    """words [n, 4] from random inputs, changed [k, n, 4] from the same with input bit k flipped.

    If the function were random, each output bit would flip with probability 1/2, independently: per input
    and output bit binomial(n, 1/2), and of the 32 bits of a word Binomial(32, 1/2) flip, 16 on average.
    """
    n = len(words)
    flips = np.empty((len(changed), 128), dtype=np.int64)
    distances = np.zeros(33, dtype=np.int64)
    for k, outputs in enumerate(changed):
        bits = bits_of(outputs ^ words)
        flips[k] = bits.sum(axis=0, dtype=np.int64)
        distances += np.bincount(bits.reshape(-1, 32).sum(axis=1), minlength=33)
    per_word = flips.reshape(len(changed), 4, 32).sum(axis=2)
    # Distances with an expected count under 500 are pooled, on each side.
    expected = stats.binom.pmf(np.arange(33), 32, 0.5) * distances.sum()
    kept = np.flatnonzero(expected >= 500.0)
    first, last = int(kept[0]), int(kept[-1])

    def pool(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        inner: NDArray[np.float64] = counts[first : last + 1].copy()
        inner[0] += counts[:first].sum()
        inner[-1] += counts[last + 1 :].sum()
        return inner

    seen, due = pool(distances.astype(np.float64)), pool(expected)
    statistic = float(((seen - due) ** 2 / due).sum())
    return [
        Check("flips of each output bit", np.abs(flips - n / 2) / np.sqrt(n / 4)),
        Check("flips of each word", np.abs(per_word - 16 * n) / np.sqrt(8 * n)),
        from_chi_square("distances of words", statistic, len(due) - 1),
    ]


def sign_sequence(signs: Signs, distances: Sequence[int]) -> list[Check]:
    """A sequence of signs +-1 [n], n a multiple of 16: balance, runs, lags, all 16-bit patterns.

    The number of places where the sign changes is binomial(n - 1, 1/2); the number of runs is one more.
    """
    n = signs.size
    negative = signs < 0
    changes = np.count_nonzero(negative[1:] != negative[:-1])
    value = signs.astype(np.float64)
    sums = [dot(value[:-d], value[d:]) / np.sqrt(n - d) for d in distances]
    patterns = np.packbits(negative).view(np.uint16)
    counts = np.bincount(patterns, minlength=1 << 16)
    return [
        from_binomial("balance", np.count_nonzero(negative), n, 0.5),
        from_binomial("runs", changes, n - 1, 0.5),
        Check("lags", np.abs(np.array(sums))),
        from_chi_square("16-bit patterns", pearson(counts), counts.size - 1),
    ]


def sign_pairs(label: str, x: Signs, others: Iterable[Signs]) -> list[Check]:
    """Correlation of signs x with each of some others."""
    value = x.astype(np.float64)
    sums = [dot(value, y.astype(np.float64)) / np.sqrt(x.size) for y in others]
    return [Check(label, np.abs(np.array(sums)))]


def rounding_up(
    label: str,
    up: NDArray[np.bool_],
    probability: NDArray[np.float64],
    factors: Mapping[str, NDArray[np.float64]],
) -> list[Check]:
    """Decisions to round a magnitude up, of known probabilities [n].

    e = up - probability has mean 0 and variance v = probability (1 - probability), whatever the value
    rounded. So sum e f has variance sum v f^2 for any factor f that does not see the rounding bits, the
    error is unbiased with f = 1, and sum e_i e_(i + d) has variance sum v_i v_(i + d). The same in 64
    classes of the probability: rounding to nearest errs in all of them, and not in their sum.
    """
    error = up - probability
    variance = probability * (1.0 - probability)
    sums = [abs(dot(error, f)) / np.sqrt(dot(variance, f * f)) for f in factors.values()]
    lagged = [
        abs(dot(error[:-d], error[d:])) / np.sqrt(dot(variance[:-d], variance[d:]))
        for d in (*range(1, 17), 128)
    ]
    classes = np.minimum((probability * 64.0).astype(np.int64), 63)
    biases = np.abs(np.bincount(classes, error, 64)) / np.sqrt(np.bincount(classes, variance, 64))
    return [
        Check(f"{label} bias by probability", biases),
        Check(f"{label} bias, times {', '.join(factors)}", np.array(sums)),
        Check(f"{label} lags", np.array(lagged)),
    ]
