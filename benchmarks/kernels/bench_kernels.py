"""pytest-benchmark suite of the weight passes. `python -m benchmarks.kernels` runs it and makes the report.

By itself: `pytest benchmarks/kernels/bench_kernels.py --bench-threads 2 --bench-dtype bf16`.

pytest-benchmark times one function to its end before the next. Here all contestants of a case are timed in
turn (see `measure.interleave`) when the case's first test runs; each test then hands its contestant's samples
to the fixture, whose timer is a clock that advances by exactly those samples.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kernels.arena import Arena, row
from benchmarks.kernels.cases import Case


class ReplayClock:
    """A timer for pytest-benchmark: reads the sum of the durations replayed so far."""

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


CLOCK = ReplayClock()


@pytest.mark.benchmark(timer=CLOCK.read, disable_gc=False)
def test_kernel(benchmark: Any, arena: Arena, case: Case, name: str) -> None:
    contestant, samples = arena.result(case, name)
    benchmark.group = case.title + (" (one seed's pass)" if contestant.repeats > 1 else "")
    benchmark.extra_info.update(row(case, contestant, samples, arena))
    remaining = iter(samples)
    benchmark.pedantic(lambda: CLOCK.advance(next(remaining)), rounds=len(samples))
