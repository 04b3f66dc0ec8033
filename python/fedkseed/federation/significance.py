"""FedKSeed-Pro: candidate seeds are drawn in proportion to how much the loss changes along them.

Qin et al., ICML 2024, arXiv 2312.06353; constants and treatment of seeds without a history are those of the
authors' code. The largest ratio of two probabilities is e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: |g| counts up to this much unless another clip is set (the authors' `bias_loss_clip`).
DEFAULT_CLIP = 1000.0
#: The history of every seed begins with this |g|, which counts as one observation, unless another start is
#: set (their `grad_initial`).
DEFAULT_START = 0.0
#: Keeps the min-max normalisation finite where all means are equal.
_SPREAD_OFFSET = 1e-10
# The remainder of the exponential series, 1 / 21!, is under half an ulp of 1.
_SERIES_TERMS = 20


@dataclass(eq=False)
class SeedSignificance:
    """What has been seen along each candidate seed, in O(K).

        m_k = (min(start, clip) + sum of min(|g|, clip) over the observations of seed k) / (1 + their number)
        x_k = (m_k - min m) / (max m - min m + 1e-10)
        p_k = exp(x_k) / sum_j exp(x_j)

    An observation is a g other than 0; on the wire, 0 is a step that was skipped. Only IEEE operations in a
    fixed order (exp by its series, the last sum exact and rounded once), so p has the same bits everywhere.

    Attributes:
        sums: fp64 [K], the sum of min(|g|, clip).
        counts: int64 [K], number of observations.
        clip: above 0; |g| counts up to it.
        start: at least 0; what the history of every seed begins with.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    clip: float = DEFAULT_CLIP
    start: float = DEFAULT_START

    @classmethod
    def empty(
        cls, num_seeds: int, clip: float = DEFAULT_CLIP, start: float = DEFAULT_START
    ) -> SeedSignificance:
        """No observation of any of K seeds: they are equally probable."""
        return cls(np.zeros(num_seeds), np.zeros(num_seeds, dtype=np.int64), clip, start)

    def copy(self) -> SeedSignificance:
        """One that can be changed without changing this."""
        return SeedSignificance(self.sums.copy(), self.counts.copy(), self.clip, self.start)

    def record_(self, indices: NDArray[np.intp], scalars: NDArray[np.float64]) -> None:
        """Adds observations one after the other, in the order given; changes ``sums`` and ``counts``.

        Args:
            indices: of the seeds, [n].
            scalars: g of each, fp64 [n], finite.
        """
        magnitudes = np.minimum(np.abs(scalars), self.clip)
        np.add.at(self.sums, indices, magnitudes)
        self.counts += np.bincount(indices[magnitudes > 0], minlength=len(self.counts))

    def probabilities(self) -> NDArray[np.float64]:
        """p, fp64 [K]: positive, their sum 1 up to rounding."""
        means = (min(self.start, self.clip) + self.sums) / (1 + self.counts)
        low = means.min()
        normalised = (means - low) / ((means.max() - low) + _SPREAD_OFFSET)
        exponentials = np.ones_like(normalised)
        for term in range(_SERIES_TERMS, 0, -1):
            exponentials = 1 + exponentials * normalised / term
        result: NDArray[np.float64] = exponentials / math.fsum(exponentials)
        return result
