"""A threshold between two labels: a model may rank rows well and still draw its line elsewhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

_Row = TypeVar("_Row")


def drawn_rows(rows: Sequence[Sequence[_Row]], count: int, seed: int) -> list[_Row]:
    """Rows of each client, drawn without replacement; all of a client that has fewer.

    Args:
        rows: by client.
        count: of each client.
        seed: of the draw: the same for every model and template.
    """
    generator = random.Random(seed)
    return [row for own in rows for row in generator.sample(own, min(count, len(own)))]


def best_threshold(margins: Sequence[float], is_positive: Sequence[bool]) -> float:
    """The threshold that answers most rows rightly if larger margins count as positive.

    It lies in the middle between two margins, or beyond all; of equally good ones the one nearest to 0.

    Args:
        margins: of at least one row.
        is_positive: what each row is.
    """
    ordered = sorted(zip(margins, is_positive, strict=True))
    right = best = sum(is_positive)
    values = [margin for margin, _ in ordered]
    candidates = [values[0] - 1, *((low + high) / 2 for low, high in pairwise(values)), values[-1] + 1]
    found = [candidates[0]]
    for index, (margin, positive) in enumerate(ordered):
        right += -1 if positive else 1
        if index + 1 < len(values) and values[index + 1] == margin:
            continue  # equal margins lie on one side
        if right > best:
            best, found = right, []
        if right == best:
            found.append(candidates[index + 1])
    return min(found, key=abs)
