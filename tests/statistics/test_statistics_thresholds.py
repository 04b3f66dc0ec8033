"""The formulas of thresholds.py against closed forms and a simulation."""

from __future__ import annotations

import noise_checks
import numpy as np
import pytest
import thresholds
from noise_domain import NORMAL_MOMENT_VARIANCES, NORMAL_MOMENTS
from scipy import special, stats


def test_sigmas_are_two_sided_quantiles() -> None:
    p = 2.0 * stats.norm.sf([0.5, 3.0, 6.0, 20.0])
    assert thresholds.from_log_p("", np.log(p)).sigmas == pytest.approx([0.5, 3.0, 6.0, 20.0])
    assert thresholds.from_log_p("", [0.0, -np.inf]).sigmas.tolist() == [0.0, thresholds.MAX_SIGMAS]


def test_moment_variances() -> None:
    """E[z^m] = (m - 1)!! for even m."""
    expected = [0.0 if m % 2 else float(special.factorial2(m - 1, exact=True)) for m in range(1, 13)]
    assert expected[:6] == NORMAL_MOMENTS.tolist()
    variances = [expected[2 * m - 1] - expected[m - 1] ** 2 for m in range(1, 7)]
    assert variances == NORMAL_MOMENT_VARIANCES.tolist()


def test_anderson_darling_bound_is_above_the_true_tail() -> None:
    """The 5 % and 1 % points of A^2 are 2.492 and 3.857 (Anderson and Darling, 1954); far out the tail is
    known to fall like exp(-x) / sqrt(x), which the bound follows to a factor."""
    assert 0.05 < np.exp(thresholds.anderson_darling_log_p(2.492)) < 0.5
    assert 0.01 < np.exp(thresholds.anderson_darling_log_p(3.857)) < 0.2
    assert -20.0 < thresholds.anderson_darling_log_p(20.0) < -16.0
    assert thresholds.anderson_darling_log_p(0.1) == 0.0


def test_binomial_and_chi_square_are_two_sided() -> None:
    counts = thresholds.from_binomial("", [450, 500, 550], 1000, 0.5).sigmas
    assert counts == pytest.approx([3.16, 0.0, 3.16], abs=0.05)
    few, many = (float(thresholds.from_chi_square("", x, 1000).sigmas[0]) for x in (800.0, 1200.0))
    assert few > 4.0
    assert many > 4.0
    assert thresholds.from_chi_square("", 1000.0, 1000, 0.5).sigmas[0] < 0.1


def test_estimates_have_unit_deviation() -> None:
    """Over 400 sound samples of 4096 the standardised estimates are spread as N(0, 1) is: mean square 1 to
    within 5 sigmas.

    The mean square of m standard normals has deviation sqrt(2 / m), of heavier estimates (z^6) somewhat more.
    """
    random = np.random.default_rng(12)
    squares = []
    for _ in range(400):
        z = random.standard_normal(4096)
        checks = noise_checks.moments("", z, NORMAL_MOMENTS)
        checks += noise_checks.cross_moments(z[0::2], z[1::2])
        checks += noise_checks.lags("", z, [1, 5])
        squares.append(np.concatenate([np.square(check.sigmas).ravel() for check in checks]))
    mean_square = np.mean(squares, axis=0)
    deviation = np.std(squares, axis=0) / np.sqrt(len(squares))
    assert (np.abs(mean_square - 1.0) < 5.0 * deviation + 0.02).all()
