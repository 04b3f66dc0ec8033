"""What the Gaussian transform is, exactly: facts over all 2^32 words, against N(0, 1).

Found by running the transform of csrc/include/normal.h over every word and summing in fp64.
test_statistics_domain.py recomputes the tails exactly, and the rest from 2^26 words spread over the domain,
to within that sample's error.
"""

from __future__ import annotations

import math

import numpy as np

NUM_WORDS = 2**32

# E[z^m] of N(0, 1), m = 1..6, and the variance of z^m: E[z^2m] - E[z^m]^2.
NORMAL_MOMENTS = np.array([0.0, 1.0, 0.0, 3.0, 0.0, 15.0])
NORMAL_MOMENT_VARIANCES = np.array([1.0, 2.0, 15.0, 96.0, 945.0, 10170.0])

# E[z^m], m = 1..6, of the even (cosine) and odd (sine) elements.
EVEN_MOMENTS = np.array([2.575e-7, 1.00000059882, 5.318e-6, 2.99989907477, 3.9047e-5, 14.9961891951])
ODD_MOMENTS = np.array([5.05e-11, 0.99999906151, 1.92e-10, 2.99989730719, 2.995e-9, 14.9962040979])

# Over both outputs of one word.
MEAN_PRODUCT = -1.18e-10  # E[even odd]
MEAN_SQUARE_PRODUCT = 0.999970183165  # E[even^2 odd^2]

# sup |F - Phi|: even, odd.
KOLMOGOROV_DISTANCE = 1.13e-5

# sum over bins of (p_i - p)^2 / p for equiprobable bins: the noncentrality of Pearson's statistic per sample.
NONCENTRALITY_1024_BINS = 1.11e-8  # of one output, the larger of the two
NONCENTRALITY_16_BY_16_BINS = 3.46e-8  # of the pair (even, odd)

# Where the distribution ends: the largest |z|, and the radius that bounds it.
LARGEST = 4.99539042
SMALLEST_RADIUS = 0.0023318

# Words with |z| above each threshold: even, odd.
TAIL_COUNTS = {3.0: (11595593, 11595640), 4.0: (271854, 271856), 4.5: (28626, 28626), 4.9: (4082, 4082)}


def normal_tail(threshold: float) -> float:
    """P(|z| > threshold) of N(0, 1)."""
    return math.erfc(threshold / math.sqrt(2.0))


def tail_probability(threshold: float) -> float:
    """P(|z| > threshold) of the contract's noise, over both outputs of a random word."""
    return sum(TAIL_COUNTS[threshold]) / (2 * NUM_WORDS)
