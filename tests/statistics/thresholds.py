"""Where a deviation stops being chance: every threshold of these tests, with its derivation.

A *check* is a set of comparisons of one kind; a *family* is the list of checks that one test judges. All
seeds are fixed, so a test gives the same answer each time. What is bounded is the chance that the fixed
seeds were unlucky:

    a generator that delivers what it promises is rejected by any test of this folder with probability at most
    FALSE_ALARM = 1e-6 (over a random choice of the seeds).

It is shared out by Bonferroni's inequality, which needs no independence: each family gets FALSE_ALARM /
NUM_FAMILIES, each comparison of a family of m an m-th of that. Everything is expressed in standard errors
("sigmas"); a p-value p counts as the two-sided normal quantile Phi^-1(1 - p / 2). The limit of a comparison
is then

    limit(m) = Phi^-1(1 - FALSE_ALARM / NUM_FAMILIES / m / 2)          5.7 for m = 1, 6.7 for m = 1,000

plus an allowance: how far the contract's noise, known exactly over its 2^32 words (noise_domain.py), lies
from N(0, 1).

Sums of n terms are taken as normal. The largest correction (Edgeworth, first order) is skew He_3(k) / (6
sqrt(n)) of the tail probability; for the worst statistic here, the mean of z^6 (skewness 32.5) at n = 2^25
and k = 6.5, it is 0.24: the tail is 24 % likelier than counted, which the rest of the budget covers many
times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

FALSE_ALARM = 1e-6
NUM_FAMILIES = 64  # an upper bound on the families judged; conftest.py holds them to it

# Where a p-value underflows; nothing here is judged that far out.
MAX_SIGMAS = 37.0


@dataclass(frozen=True)
class Check:
    """Comparisons of one kind.

    Attributes:
        label: what is compared.
        sigmas: |observed - expected| / standard error, any shape.
        allowance: what the contract's known bias may add to each, in the same unit.
    """

    label: str
    sigmas: NDArray[np.float64]
    allowance: NDArray[np.float64] = field(default_factory=lambda: np.zeros(()))


# What the fixture `judge` is: fails the family named by its first argument if a comparison is beyond its
# limit.
Judge = Callable[[str, Sequence[Check]], None]


def limit(num_comparisons: int) -> float:
    """The two-sided normal quantile that each of num_comparisons of one family has to stay below."""
    return -NormalDist().inv_cdf(FALSE_ALARM / NUM_FAMILIES / num_comparisons / 2)


def family_limit(checks: Sequence[Check]) -> float:
    """The limit of a family: its comparisons are counted over all of its checks."""
    return limit(sum(check.sigmas.size for check in checks))


def violations(checks: Sequence[Check]) -> list[str]:
    """One line for each check with a comparison over its limit; a NaN is over it."""
    allowed = family_limit(checks)
    lines = []
    for check in checks:
        within = check.sigmas <= allowed + check.allowance
        if not within.all():
            worst = np.nan_to_num(check.sigmas, nan=np.inf).max()
            lines.append(
                f"{check.label}: {np.count_nonzero(~within)} of {check.sigmas.size} over {allowed:.2f} "
                f"sigmas, the largest {worst:.2f}"
            )
    return lines


def from_estimates(
    label: str, observed: object, expected: object, error: object, bias: object = 0.0
) -> Check:
    """Estimates with known standard errors; bias is |contract - N(0, 1)| in the estimate's unit."""
    error64 = np.asarray(error, dtype=np.float64)
    sigmas = np.abs(np.asarray(observed, np.float64) - np.asarray(expected, np.float64)) / error64
    return Check(label, np.atleast_1d(sigmas), np.abs(np.asarray(bias, dtype=np.float64)) / error64)


def from_log_p(label: str, log_p: object) -> Check:
    """Two-sided p-values, given as logarithms so that tiny ones keep their order."""
    half = np.asarray(log_p, dtype=np.float64) - math.log(2.0)
    sigmas = np.clip(-special.ndtri_exp(np.minimum(half, -math.log(2.0))), 0.0, MAX_SIGMAS)
    return Check(label, np.atleast_1d(sigmas))


def from_chi_square(label: str, statistic: object, degrees: int, noncentrality: float = 0.0) -> Check:
    """Pearson's statistic, two-sided: a fit that is too good is not random either.

    Pearson's statistic is chi-square with `degrees` degrees of freedom in the limit of many counts a bin
    (at least 500 here). Bin probabilities that differ from the assumed ones by d_i make it noncentral, with
    noncentrality n sum d_i^2 / p_i.
    """
    law = stats.ncx2(degrees, noncentrality) if noncentrality else stats.chi2(degrees)
    smaller_tail = np.minimum(law.logsf(statistic), law.logcdf(statistic))
    return from_log_p(label, np.minimum(smaller_tail + math.log(2.0), 0.0))


def from_binomial(label: str, counts: object, trials: int, probability: object) -> Check:
    """Counts of trials independent events, two-sided and exact: twice the smaller tail."""
    law = stats.binom(trials, probability)
    with np.errstate(divide="ignore"):
        smaller_tail = np.minimum(law.logsf(np.asarray(counts) - 1), law.logcdf(counts))
    return from_log_p(label, np.minimum(smaller_tail + math.log(2.0), 0.0))


def from_kolmogorov(label: str, distance: float, num_samples: int, bias: float = 0.0) -> Check:
    """sup |F_n - Phi| of num_samples samples.

    The inequality of Dvoretzky, Kiefer and Wolfowitz with Massart's constant holds for every n and every
    distribution, lattices included: P(sup |F_n - F| > d) <= 2 exp(-2 n d^2). With sup |F - Phi| = bias the
    triangle inequality gives the same for Phi at d - bias.
    """
    excess = max(distance - bias, 0.0)
    return from_log_p(label, min(math.log(2.0) - 2.0 * num_samples * excess**2, 0.0))


def anderson_darling_log_p(statistic: float) -> float:
    """An upper bound on ln P(A^2 > statistic), by Chernoff.

    In the limit A^2 = sum over j >= 1 of X_j^2 / (j (j + 1)), X_j independent N(0, 1) (Anderson and
    Darling, 1952), so E exp(t A^2) = prod (1 - 2 t / (j (j + 1)))^(-1/2) for t < 1, and P(A^2 > x) <=
    exp(-t x) E exp(t A^2) for every such t. The product is -2 pi t / cos(pi sqrt(1 + 8 t) / 2), to the
    power 1/2.
    """

    def log_bound(t: float) -> float:
        product = -2.0 * math.pi * t / math.cos(math.pi / 2.0 * math.sqrt(1.0 + 8.0 * t))
        return 0.5 * math.log(product) - t * statistic

    best = optimize.minimize_scalar(log_bound, bounds=(1e-6, 1.0 - 1e-9), method="bounded")
    return min(float(best.fun), 0.0)


def from_anderson_darling(label: str, statistic: float, num_samples: int, bias: float = 0.0) -> Check:
    """A^2 = n integral (F_n - Phi)^2 / (Phi (1 - Phi)) dPhi of num_samples samples.

    A is a weighted L2 distance, so the triangle inequality applies: A <= A(F_n, F) + sqrt(n) distance(F,
    Phi), where distance(F, Phi)^2 <= bias^2 integral 1 / (u (1 - u)) du over the range of z (|z| < 5) <= 31
    bias^2, bias = sup |F - Phi|.
    """
    root = max(math.sqrt(max(statistic, 0.0)) - math.sqrt(31.0 * num_samples) * bias, 0.0)
    return from_log_p(label, anderson_darling_log_p(root**2))
