"""What keeps one reply from carrying a round away: a clip at the round's median |g|, a cap of the weights.

Both depend on the replies of the round alone, and not on the order in which they came; sorting and IEEE
operations in a fixed order, so the same bits everywhere. docs/protocol.md gives what they do to liars and to
honest clients, in figures of `benchmarks.liars`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Bounds(NamedTuple):
    """What a reply may do at most; see `fedkseed.federation.config.RoundConfig`."""

    median_clip: float
    share_cap: float


#: What adapters put in unless told otherwise, in the window that `benchmarks.liars` shows: one liar among 16
#: moves the weights 2.3 times as far as honest clients do, four of them 5.2 times; and four honest clients of
#: sizes 58 : 17 : 15 : 10 keep their weights, and all but one g in 1,300 if g is normal.
RECOMMENDED_BOUNDS = Bounds(median_clip=5.0, share_cap=2.4)


def median_magnitudes(scalars: NDArray[np.float32]) -> NDArray[np.float64]:
    """The median |g| of each reply, without those of which all g are 0.

    A g of 0 is a step that was skipped and does not count; a reply of nothing else does not either.

    Args:
        scalars: of some replies of a round, [n, tau], finite.
    """
    ordered = np.sort(np.abs(scalars), axis=1)
    counts = np.count_nonzero(ordered, axis=1)
    ordered, counts = ordered[counts > 0], counts[counts > 0, None]
    # Zeros stand first; the two in the middle of the others are one and the same if their number is odd.
    middle = ordered.shape[1] - counts + np.hstack(((counts - 1) // 2, counts // 2))
    found: NDArray[np.float64] = np.take_along_axis(ordered, middle, axis=1).astype(np.float64).mean(axis=1)
    return found


def median_magnitude(parts: Iterable[NDArray[np.float32]]) -> float | None:
    """The median over the replies of each one's median |g|; None if all are 0.

    So a reply counts once whatever it holds: four liars of 16 shift this by as much as honest replies differ
    in their medians, and not, as in a median of all g, into the tail of the honest ones.

    Args:
        parts: the scalars of all replies of a round, some replies at a time.
    """
    medians = np.concatenate([median_magnitudes(scalars) for scalars in parts])
    return float(np.median(medians)) if medians.size else None


def clipped(scalars: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """The scalars with every |g| above ``limit`` set to it, its sign kept; a new array."""
    return np.clip(scalars, -limit, limit)


def capped_weights(
    shares: NDArray[np.float64], multiple: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Weights in proportion to the shares, none above ``multiple`` / n; what is cut goes to the others.

    The others keep their proportions: the largest weights are cut in turn until none is above the cap.

    Args:
        shares: of n replies, fp64 [n], positive.
        multiple: at least 1, so that all weights together can be 1; 0 for no cap.

    Returns:
        The weights, fp64 [n], their sum 1 up to rounding, and which of them were cut.
    """
    weights = shares / shares.sum()
    is_cut = np.zeros(len(shares), dtype=np.bool_)
    if not multiple:
        return weights, is_cut
    cap = multiple / len(shares)
    while (above := (weights > cap) & ~is_cut).any():
        is_cut |= above
        rest = shares[~is_cut].sum()
        if rest == 0:  # all are cut, which rounding alone brings about: they weigh the same
            return np.full(len(shares), 1.0 / len(shares)), is_cut
        weights = np.where(is_cut, cap, shares / rest * (1 - cap * is_cut.sum()))
    return weights, is_cut
