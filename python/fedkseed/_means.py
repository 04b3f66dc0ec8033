"""The mean of Python floats, to the same bits on every Python."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import reduce


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean: the values added one after the other, each sum rounded.

    Not ``sum``, which since Python 3.12 carries the rounding errors of floats along: means of one run, in
    metrics.jsonl, would have other bits on 3.11.

    Raises:
        ValueError: no values.
    """
    listed = list(values)
    if not listed:
        raise ValueError("expected at least one value to take the mean of, got none")
    return reduce(operator.add, listed, 0.0) / len(listed)
