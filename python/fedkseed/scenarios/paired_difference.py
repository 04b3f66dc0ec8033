"""Intervals of accuracies, and of differences of accuracies or losses on the same rows.

All are for independent rows; rows of one document are more alike than that, so that an interval over them is
a little too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def accuracy_interval(num_right: int, num_rows: int, level: float = LEVEL) -> Interval:
    """The share of right rows with Wilson's score interval (E. B. Wilson, JASA 22, 1927).

    Raises:
        ValueError: no rows, more right ones than rows, or a level outside (0, 1).
    """
    z = _quantile(level)
    if not 0 <= num_right <= num_rows or num_rows < 1:
        raise ValueError(f"expected 0 to {num_rows} right rows of at least one, got {num_right}")
    share = num_right / num_rows
    scale = 1 + z * z / num_rows
    centre = (share + z * z / (2 * num_rows)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_rows + (z / (2 * num_rows)) ** 2)
    low = 0.0 if num_right == 0 else centre - half
    return Interval(share, low, 1.0 if num_right == num_rows else centre + half)


def paired_difference(before: Sequence[bool], after: Sequence[bool], level: float = LEVEL) -> Interval:
    """Accuracy after less accuracy before on the same rows, with the adjusted Wald interval for paired data.

    D. G. Bonett, R. M. Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions
    Based on Paired Data", Journal of Educational and Behavioral Statistics 37, 2012. It stays a little wide
    where few rows change sides.

    Args:
        before: whether each row was right.
        after: the same rows, in the same order.
        level: of confidence.

    Raises:
        ValueError: no rows, not the same number of them, or a level outside (0, 1).
    """
    z = _quantile(level)
    if len(before) != len(after) or not before:
        raise ValueError(f"expected the same rows before and after, got {len(before)} and {len(after)}")
    num_gained = sum(now and not then for then, now in zip(before, after, strict=True))
    num_lost = sum(then and not now for then, now in zip(before, after, strict=True))
    gained, lost = ((count + 1) / (len(before) + 2) for count in (num_gained, num_lost))
    half = z * math.sqrt((gained + lost - (gained - lost) ** 2) / (len(before) + 2))
    centre = gained - lost
    estimate = (num_gained - num_lost) / len(before)
    return Interval(estimate, max(-1.0, centre - half), min(1.0, centre + half))


def mean_difference(before: Sequence[float], after: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean loss after less mean loss before on the same rows, with the normal interval of paired differences.

    Args:
        before: of each row.
        after: the same rows, in the same order.
        level: of confidence.

    Raises:
        ValueError: fewer than two rows, not the same number of them, or a level outside (0, 1).
    """
    z = _quantile(level)
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(
            f"expected the same two or more rows before and after, got {len(before)} and {len(after)}"
        )
    differences = [now - then for then, now in zip(before, after, strict=True)]
    estimate = fmean(differences)
    half = z * stdev(differences) / math.sqrt(len(differences))
    return Interval(estimate, estimate - half, estimate + half)


def _quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"expected a level of confidence in (0, 1), got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)
