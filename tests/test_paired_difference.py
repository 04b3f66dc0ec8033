"""Intervals of accuracies, against values worked out by hand and against what they promise."""

from __future__ import annotations

import math
import random

import pytest

from fedkseed.scenarios.paired_difference import (
    Interval,
    accuracy_interval,
    mean_difference,
    paired_difference,
)


def test_wilson_against_published_values() -> None:
    # R. G. Newcombe, Statistics in Medicine 17, 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for num_right, num_rows, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = accuracy_interval(num_right, num_rows)
        assert found.estimate == num_right / num_rows
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert accuracy_interval(7, 7).high == 1.0


def rows(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return before, [True] * (both + gained) + [False] * (lost + neither)


def test_paired_difference_by_hand() -> None:
    found = paired_difference(*rows(200, 90, 10, 100))
    # (91 - 11) / 402, and 1.96 sqrt((102 / 402 - (80 / 402)^2) / 402)
    centre, half = 0.1990050, 1.9599640 * math.sqrt((0.2537313 - 0.0396030) / 402)
    assert found.estimate == 0.2
    assert found.low == pytest.approx(centre - half, abs=1e-6)
    assert found.high == pytest.approx(centre + half, abs=1e-6)
    assert str(found) == "0.200 [0.154, 0.244]"


def test_no_row_changed_gives_an_interval_around_zero() -> None:
    found = paired_difference(*rows(30, 0, 0, 10))
    assert found.estimate == 0.0
    assert found.low == -found.high < 0


def test_swapped_sides_mirror_the_interval() -> None:
    before, after = rows(3, 9, 2, 5)
    there, back = paired_difference(before, after), paired_difference(after, before)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-15)


def test_paired_interval_covers_the_true_difference_at_its_level() -> None:
    generator = random.Random(5)
    shares = (0.55, 0.2, 0.05)  # right twice, gained, lost: a difference of 0.15
    covered = 0
    for _ in range(2000):
        draws = generator.choices(((1, 1), (0, 1), (1, 0), (0, 0)), (*shares, 1 - sum(shares)), k=60)
        found = paired_difference([bool(a) for a, _ in draws], [bool(b) for _, b in draws])
        covered += found.low <= 0.15 <= found.high
    assert 0.935 <= covered / 2000 <= 0.975  # 0.95, with 3 standard deviations and the interval's width


def test_mean_difference_by_hand() -> None:
    found = mean_difference([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 1.0, 3.0])
    # Differences -1, 0, -2, -1: their mean -1, their variance 2 / 3.
    half = 1.959963984540054 * math.sqrt(2 / 3) / 2
    assert (found.estimate, found.low, found.high) == pytest.approx((-1.0, -1 - half, -1 + half), abs=1e-12)
    assert mean_difference([5.0, 7.0], [6.0, 8.0]) == Interval(1.0, 1.0, 1.0)


def test_the_interval_of_a_mean_difference_covers_the_true_one_at_its_level() -> None:
    """Rows differ far more among each other than before and after do, which pairing takes out."""
    generator = random.Random(6)
    covered, widths = 0, []
    for _ in range(1000):
        before = [generator.expovariate(1.0) * 5 for _ in range(80)]
        after = [loss - 0.3 + generator.gauss(0, 0.5) for loss in before]
        found = mean_difference(before, after)
        covered += found.low <= -0.3 <= found.high
        widths.append(found.high - found.low)
    assert 0.925 <= covered / 1000 <= 0.97  # 0.95, with 3 standard deviations
    assert max(widths) < 0.4, "unpaired it would be 3"


def test_refusals() -> None:
    for before, after in (([1.0, 2.0], [1.0]), ([1.0], [1.0])):
        with pytest.raises(ValueError, match="the same two or more rows before and after"):
            mean_difference(before, after)
    with pytest.raises(ValueError, match="expected 0 to 3 right rows"):
        accuracy_interval(4, 3)
    with pytest.raises(ValueError, match="expected 0 to 0 right rows of at least one"):
        accuracy_interval(0, 0)
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([True, False], [True])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_difference([], [])
    with pytest.raises(ValueError, match=r"level of confidence in \(0, 1\)"):
        accuracy_interval(1, 2, level=1.0)
