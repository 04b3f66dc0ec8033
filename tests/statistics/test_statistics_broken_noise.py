"""The checks reject noise that is wrong in a known way, and accept NumPy's own: none of this comes from the
package.

No sample is larger than the one of the real test, so what is rejected here would have been found there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import bit_checks
import noise_checks
import numpy as np
import pytest
from noise_domain import NORMAL_MOMENTS
from numpy.typing import NDArray
from scipy import special
from thresholds import Check, family_limit, violations

Noise = NDArray[np.float64]
Random = np.random.Generator

DISTRIBUTION_SAMPLES = 1 << 23
SEQUENCE_SAMPLES = 1 << 22


def sound(random: Random, n: int) -> Noise:
    return random.standard_normal(n)


def moments(z: Noise) -> list[Check]:
    return [*noise_checks.moments("all", z, NORMAL_MOMENTS), *noise_checks.cross_moments(z[0::2], z[1::2])]


def distribution_function(z: Noise) -> list[Check]:
    return noise_checks.distribution_function("all", z)


def equiprobable_bins(z: Noise) -> list[Check]:
    return noise_checks.equiprobable_bins("all", z)


def sequence_checks(z: Noise) -> list[Check]:
    """What test_statistics_independence.py judges of one stream."""
    groups = z.reshape(-1, 8)
    return [
        *noise_checks.column_correlations("in one group", groups),
        *noise_checks.column_correlations("next group", groups[:-1], groups[1:]),
        *noise_checks.lags("lags", z, [*range(1, 17), 128]),
        *noise_checks.joint_bins({"neighbours": (z[:-1], z[1:])}),
    ]


def irwin_hall(random: Random, n: int) -> Noise:
    z: Noise = (random.random((4, n)).sum(axis=0) - 2.0) * np.sqrt(3.0)
    return z


def heavy(random: Random, n: int) -> Noise:
    """Kurtosis 3.02, variance 1: a scale that varies by 4 %."""
    scale = np.where(random.random(n) < 0.5, 1.0 + 0.0408, 1.0 - 0.0408)
    z: Noise = random.standard_normal(n) * scale / np.sqrt(1.0 + 0.0408**2)
    return z


def cut_tail(random: Random, n: int) -> Noise:
    z = random.standard_normal(n)
    z[np.abs(z) > 4.0] = 0.0
    return z


def stratified(random: Random, n: int) -> Noise:
    """Exactly equal numbers in every cell: the right distribution, and far too even to be random."""
    z: Noise = special.ndtri((random.permutation(n) + 0.5) / n)
    return z


def coarse(random: Random, n: int) -> Noise:
    """A lattice of 2^-8."""
    return np.round(random.standard_normal(n) * 256.0) / 256.0


# Noise, and the check that has to reject it.
BROKEN_SHAPES: dict[str, tuple[Callable[[Random, int], Noise], Callable[[Noise], list[Check]]]] = {
    "mean shifted by 3e-3": (lambda random, n: random.standard_normal(n) + 3e-3, distribution_function),
    "deviation off by 3e-3": (lambda random, n: random.standard_normal(n) * 1.003, moments),
    "kurtosis 3.02": (heavy, moments),
    "Irwin-Hall of 4 uniforms, moments": (irwin_hall, moments),
    "Irwin-Hall of 4 uniforms, bins": (irwin_hall, equiprobable_bins),
    "Irwin-Hall of 4 uniforms, tails": (irwin_hall, noise_checks.tails),
    "tail cut at 4": (cut_tail, noise_checks.tails),
    "too even": (stratified, equiprobable_bins),
    "lattice of 2^-8": (coarse, equiprobable_bins),
}


def correlated(random: Random, n: int) -> Noise:
    """Neighbours correlated 0.005."""
    z = random.standard_normal(n + 1)
    neighbours: Noise = (z[1:] + 0.005 * z[:-1]) / np.sqrt(1.0 + 0.005**2)
    return neighbours


def shared_radius(random: Random, n: int) -> Noise:
    """Both of a word of one length and random signs: uncorrelated, not independent."""
    z = random.standard_normal(n)
    z[1::2] = np.abs(z[0::2]) * np.where(random.random(n // 2) < 0.5, 1.0, -1.0)
    return z


def repeated_word(random: Random, n: int) -> Noise:
    """One group in 64 gives its first word to the last."""
    groups = random.standard_normal((n // 8, 8))
    groups[::64, 6:] = groups[::64, :2]
    return groups.ravel()


def repeated_period(random: Random, n: int) -> Noise:
    """One group in 64 repeats the group 16 before: lag 128."""
    groups = random.standard_normal((n // 8, 8))
    groups[16::64] = groups[: len(groups) - 16 : 64]
    return groups.ravel()


BROKEN_SEQUENCES: dict[str, Callable[[Random, int], Noise]] = {
    "neighbours correlated 0.005": correlated,
    "one radius for both of a word": shared_radius,
    "a word repeated in its group": repeated_word,
    "groups repeated 16 later": repeated_period,
}


@pytest.mark.slow
def test_sound_noise_is_accepted() -> None:
    z = sound(np.random.default_rng(1), DISTRIBUTION_SAMPLES)
    for checks in (moments, distribution_function, equiprobable_bins, noise_checks.tails):
        assert not violations(checks(z))
    assert not violations(sequence_checks(z[:SEQUENCE_SAMPLES]))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", BROKEN_SHAPES)
def test_wrong_shape_is_rejected(name: str) -> None:
    broken, checks = BROKEN_SHAPES[name]
    assert violations(checks(broken(np.random.default_rng(2), DISTRIBUTION_SAMPLES)))


@pytest.mark.slow
def test_mean_shifted_by_a_thousandth_is_rejected() -> None:
    """A deviation of 8.2 sigmas at the 2^26 samples of the moments test."""
    random = np.random.default_rng(3)
    z = np.concatenate([random.standard_normal(1 << 24, dtype=np.float32) for _ in range(4)])
    assert not violations(noise_checks.moments("sound", z, NORMAL_MOMENTS))
    z += np.float32(1e-3)
    assert violations(noise_checks.moments("shifted", z, NORMAL_MOMENTS))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", BROKEN_SEQUENCES)
def test_dependence_inside_a_stream_is_rejected(name: str) -> None:
    z = BROKEN_SEQUENCES[name](np.random.default_rng(4), SEQUENCE_SAMPLES)
    assert violations(sequence_checks(z))


def test_repeated_streams_are_rejected() -> None:
    """A stream that is another's copy, negated, shifted in part, or its magnitudes only."""
    random = np.random.default_rng(5)
    streams = random.standard_normal((8, 1 << 16))
    rows = np.ascontiguousarray(streams.T)
    assert not violations(noise_checks.column_correlations("sound", rows))
    part = streams[0].copy()
    part[: 1 << 12] = streams[1, : 1 << 12]
    signs = np.where(random.random(1 << 16) < 0.5, 1.0, -1.0)
    for changed in (streams[1], -streams[1], part, np.abs(streams[1]) * signs):
        rows[:, 0] = changed
        assert violations(noise_checks.column_correlations("repeated", rows))
        assert violations(noise_checks.correlations("repeated", streams[1], [streams[2], changed]))


@pytest.mark.slow
def test_wrong_covariance_is_rejected() -> None:
    random = np.random.default_rng(6)
    rows = random.standard_normal((1 << 13, 64))
    assert not violations(noise_checks.covariance(rows))
    repeated = rows.copy()
    repeated[:, 0] = rows[:, 63]
    scaled = rows * 1.05
    mixed = rows + 0.02 * rows.sum(axis=1, keepdims=True)
    repeated_seeds = np.repeat(rows[: 1 << 12], 2, axis=0)
    for broken in (repeated, scaled, mixed, rows + 0.1):
        assert violations(noise_checks.covariance(broken))
    # Twice the same seeds looks like half as many of them, so only sizes see it: the sum of all of them does.
    total = repeated_seeds.sum(axis=0) / np.sqrt(len(repeated_seeds))
    assert noise_checks.raw_moments(total)[1] > 1.5


def philox(counters: NDArray[np.uint32], keys: NDArray[np.uint32], rounds: int) -> NDArray[np.uint32]:
    """Philox4x32 with fewer rounds than ten."""
    low = np.uint64(0xFFFFFFFF)
    c = [counters[:, i].astype(np.uint64) for i in range(4)]
    k = [keys[:, i].astype(np.uint64) for i in range(2)]
    for _ in range(rounds):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, axis=1).astype(np.uint32)


@pytest.mark.parametrize(("rounds", "accepted"), [(3, False), (4, False), (10, True)])
def test_avalanche_needs_the_rounds(rounds: int, accepted: bool) -> None:
    random = np.random.default_rng(7)
    counters = np.zeros((1 << 13, 4), dtype=np.uint32)
    counters[:, 0] = np.arange(1 << 13)
    keys = random.integers(0, 2**32, (1 << 13, 2), dtype=np.uint32)
    words = philox(counters, keys, rounds)
    changed = []
    for word in range(4):
        for bit in (0, 7, 31):
            other = counters.copy()
            other[:, word] ^= np.uint32(1 << bit)
            changed.append(philox(other, keys, rounds))
    assert (not violations(bit_checks.avalanche(words, np.stack(changed)))) == accepted


@pytest.mark.slow
def test_wrong_bits_are_rejected() -> None:
    random = np.random.default_rng(8)
    words = random.integers(0, 2**32, (1 << 14, 4), dtype=np.uint32)
    bits = bit_checks.bits_of(words)
    assert bits[0, 32 + 5] == words[0, 1] >> 5 & 1
    assert not violations(bit_checks.bit_columns("sound", bits))
    rare = random.random(len(bits)) < 0.1
    biased = bits.copy()
    biased[rare, 77] = 1
    within = bits.copy()
    within[rare, 3] = bits[rare, 100]
    across = bits.copy()
    across[1:][rare[1:], 3] = bits[:-1][rare[1:], 3]
    for broken in (biased, within, across):
        assert violations(bit_checks.bit_columns("broken", broken))
    assert violations(bit_checks.bit_columns("two tags", within[:, :4], bits[:, 100:104]))


def test_wrong_signs_are_rejected() -> None:
    random = np.random.default_rng(9)
    n = 1 << 23
    distances: Sequence[int] = [1, 2, 128]
    uniform = random.random(n)

    def signs(negative: NDArray[np.bool_]) -> NDArray[np.float32]:
        return np.where(negative, -1.0, 1.0).astype(np.float32)

    assert not violations(bit_checks.sign_sequence(signs(uniform < 0.5), distances))
    biased = signs(uniform < 0.502)
    sticky = signs(np.bitwise_xor.accumulate(uniform < 0.498))
    repeated = signs(uniform < 0.5)
    repeated.reshape(-1, 128)[1::256] = repeated.reshape(-1, 128)[::256]
    patterned = signs(uniform < 0.5)
    # Parity of 16 neighbours even a little more often than odd: no pair shows it.
    rows = patterned.reshape(-1, 16)
    odd = (rows.prod(axis=1) < 0) & (random.random(len(rows)) < 0.2)
    rows[odd, 15] *= -1
    for broken in (biased, sticky, repeated, patterned):
        assert violations(bit_checks.sign_sequence(broken, distances))
    assert violations(bit_checks.sign_pairs("repeated", biased[:4096], [biased[:4096]]))


def test_wrong_rounding_is_rejected() -> None:
    random = np.random.default_rng(10)
    n = 1 << 20
    fraction = random.integers(0, 65536, n) / 65536.0
    z = random.standard_normal(n)
    r = random.random(n)
    factors = {"1": np.ones(n), "z": z, "z^2 - 1": z * z - 1.0}

    def rejected(up: NDArray[np.bool_]) -> bool:
        return bool(violations(bit_checks.rounding_up("up", up, fraction, factors)))

    assert not rejected(r < fraction)
    assert rejected(np.floor(r * 128.0) / 128.0 < fraction), "7 random bits"
    assert rejected(special.ndtr(z) < fraction), "the noise's own bits"
    assert rejected(np.where(np.arange(n) % 64 == 0, special.ndtr(z), r) < fraction), (
        "the noise's own bits in 1 of 64"
    )
    assert rejected(np.repeat(r[: n // 2], 2) < fraction), "one random number for both of a word"
    assert rejected(fraction >= 0.5), "to nearest"


def test_limits() -> None:
    """The limit grows with the number of comparisons, and a NaN is over it."""
    one = Check("one", np.array([5.6]))
    assert not violations([one])
    assert violations([Check("one", np.array([5.7]))])
    assert not violations([Check("one", np.array([5.7])), Check("others", np.zeros(99))])
    assert violations([Check("not a number", np.array([np.nan]))])
    assert not violations([Check("with its bias", np.array([6.5]), np.array([1.0]))])
    assert family_limit([one]) == pytest.approx(5.6546, abs=1e-4)
