"""Values derived from a base seed: candidate seeds, schedules, client samples, rounding seeds.

Section 9 of the noise contract. NumPy only, the same on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkseed_kernels.contract.reference import TAG_DERIVED, group_words

PURPOSE_CANDIDATE_SEEDS = 0
PURPOSE_SCHEDULE = 1
PURPOSE_CLIENT_SAMPLING = 2
PURPOSE_ROUNDING_SEEDS = 3


def words(base_seed: int, purpose: int, indices: Any) -> NDArray[np.uint32]:
    """The four Philox words of each index.

    Args:
        base_seed: any integer, taken mod 2^64.
        purpose: one of the PURPOSE_ numbers, an integer in [0, 2^32).
        indices: integers in [0, 2^64), shape [n].
    Returns: uint32 [n, 4].
    Raises:
        ValueError: purpose or an index out of range.
    """
    if not 0 <= purpose < 2**32:
        raise ValueError(f"expected a purpose in [0, 2^32), got {purpose}")
    array = np.asarray(indices)
    if array.ndim != 1 or (array.size and (array.dtype.kind not in "iu" or int(array.min()) < 0)):
        got = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"expected non-negative integer indices of shape [n], got {got}")
    # The counter of section 9 is that of section 3 with the purpose in the stream's place.
    return group_words(base_seed, purpose, array.astype(np.uint64), TAG_DERIVED)


def seeds(base_seed: int, purpose: int, indices: Any) -> NDArray[np.uint64]:
    """seed = word0 + word1 2^32 of each index, uint64 [n]."""
    w = words(base_seed, purpose, indices).astype(np.uint64)
    result: NDArray[np.uint64] = w[:, 0] | (w[:, 1] << np.uint64(32))
    return result


def candidate_seeds(base_seed: int, num_seeds: int) -> NDArray[np.uint64]:
    """The first num_seeds candidate seeds of a base seed, uint64 [num_seeds]."""
    return seeds(base_seed, PURPOSE_CANDIDATE_SEEDS, np.arange(num_seeds, dtype=np.uint64))


def uniforms(base_seed: int, purpose: int, indices: Any) -> NDArray[np.float64]:
    """((word0 >> 5) 2^26 + (word1 >> 6)) 2^-53 of each index: fp64 [n] in [0, 1), exact."""
    w = words(base_seed, purpose, indices).astype(np.uint64)
    numerator = ((w[:, 0] >> np.uint64(5)) << np.uint64(26)) + (w[:, 1] >> np.uint64(6))
    result: NDArray[np.float64] = numerator.astype(np.float64) * 2.0**-53
    return result


def draw(probabilities: Any, uniforms: Any) -> NDArray[np.int64]:
    """For each uniform number the first index whose running sum of probabilities exceeds it.

    The sum runs in fp64 in index order. Where rounding leaves none, the last index of positive probability.

    Args:
        probabilities: fp64 [m], non-negative, finite; they are not normalised here.
        uniforms: fp64 [n] in [0, 1).
    Returns: int64 [n].
    Raises:
        ValueError: a probability is negative or not finite, or none is positive.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 1 or not np.isfinite(p).all() or (p < 0).any() or not (p > 0).any():
        raise ValueError(f"expected finite, non-negative probabilities [m], one of them positive, got {p!r}")
    # np.cumsum adds one after the other; np.sum would add pairwise.
    first = np.searchsorted(np.cumsum(p), np.asarray(uniforms, dtype=np.float64), side="right")
    return np.asarray(np.minimum(first, np.flatnonzero(p)[-1]), dtype=np.int64)
