"""What the two-point estimator needs of the noise: over seeds, E[z z^T] is the identity.

With g = (L(w + eps z) - L(w - eps z)) / (2 eps) = grad . z for small eps, the update E[g z] = E[z z^T] grad
is the gradient only then.
"""

from __future__ import annotations

import noise_checks
import numpy as np
import pytest
from noise_samples import SEED, gaussian
from numpy.typing import NDArray
from thresholds import Judge, from_estimates

from fedkseed_kernels.contract import derived

NUM_SEEDS = 1 << 13


@pytest.fixture(scope="module")
def block() -> NDArray[np.float32]:
    """z of 32 elements in each of two streams, one far out, one row a seed of a pool: [8192, 64]."""
    seeds = [int(seed) for seed in derived.candidate_seeds(SEED, NUM_SEEDS)]
    return np.stack([np.append(gaussian(32, seed), gaussian(32, seed, 17, 1 << 40)) for seed in seeds])


def test_covariance_over_seeds_is_the_identity(judge: Judge, block: NDArray[np.float32]) -> None:
    judge("covariance over seeds", noise_checks.covariance(block))


def test_two_point_estimate_is_unbiased(judge: Judge, block: NDArray[np.float32]) -> None:
    """The mean of (grad . z) z over m seeds is grad, with variance (|grad|^2 + grad_i^2) / m in place i.

    (Var of the product: E[(grad . z)^2 z_i^2] = |grad|^2 + 2 grad_i^2, less the squared mean grad_i^2.)
    """
    gradient: NDArray[np.float64] = np.random.default_rng(5).standard_normal((block.shape[1],))
    z = block.astype(np.float64)
    slopes = z @ gradient
    estimate = z.T @ slopes / len(z)
    error = np.sqrt((gradient @ gradient + gradient**2) / len(z))
    judge("two-point estimate", [from_estimates("gradient", estimate, gradient, error)])


def test_squared_length(judge: Judge, block: NDArray[np.float32]) -> None:
    """|z|^2 of d elements is chi-square with d degrees of freedom: mean d, variance 2 d."""
    m, d = block.shape
    squares = np.square(block.astype(np.float64)).sum(axis=1)
    fourth = 12.0 * d * (d + 4)  # central moment of chi-square
    judge(
        "squared length over seeds",
        [
            from_estimates("mean", squares.mean(), d, np.sqrt(2 * d / m)),
            from_estimates(
                "variance", np.square(squares - d).mean(), 2 * d, np.sqrt((fourth - 4 * d * d) / m)
            ),
        ],
    )
