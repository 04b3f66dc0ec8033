"""Timing: contestants take turns, sample by sample, so that a change of load meets all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Contestant:
    """One way to do a case's operation.

    Attributes:
        name: unique within the case.
        kind: "ours", "official", "torch" (the simplest torch way), "triton" (Triton's own generator), "noise"
            (only draws it), "copy" or "step" (a whole one).
        run: does one sample; its argument is the sample's index.
        num_samples: how often it is timed.
        repeats: how many samples' work the whole operation is; over 1, its figures are extrapolated.
        isa: the instruction set, for ours.
        warm_up: a short call that loads code and fills pools, not timed.
        check_before, check_after: raise when the answer is wrong; before all timing, after the last sample.
    """

    name: str
    kind: str
    run: Callable[[int], None]
    num_samples: int
    repeats: int = 1
    isa: str = ""
    warm_up: Callable[[], None] | None = None
    check_before: Callable[[], None] | None = None
    check_after: Callable[[], None] | None = None


def is_due(num_samples: int, num_rounds: int, round_index: int) -> bool:
    """Whether a contestant has a sample in this round: they lie evenly, a single one in the middle."""
    return any(
        (2 * sample + 1) * num_rounds // (2 * num_samples) == round_index for sample in range(num_samples)
    )


def interleave(
    contestants: Sequence[Contestant],
    reset: Callable[[], None],
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every sample by contestant's name.

    Every sample starts from reset weights; every second round takes the contestants in reverse.

    Raises:
        ValueError: two contestants of one name.
        AssertionError: a contestant's answer is wrong; then there are no timings.
    """
    if len({contestant.name for contestant in contestants}) < len(contestants):
        raise ValueError(f"expected unique names, got {[contestant.name for contestant in contestants]}")
    for contestant in contestants:
        if contestant.check_before is not None:
            contestant.check_before()
    for contestant in contestants:
        if contestant.warm_up is not None:
            contestant.warm_up()

    samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    num_rounds = max((contestant.num_samples for contestant in contestants), default=0)
    gc_was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_index in range(num_rounds):
            due = [c for c in contestants if is_due(c.num_samples, num_rounds, round_index)]
            for contestant in due if round_index % 2 == 0 else reversed(due):
                reset()
                done = samples[contestant.name]
                start = timer()
                contestant.run(len(done))
                done.append(timer() - start)
                if len(done) == contestant.num_samples and contestant.check_after is not None:
                    contestant.check_after()
    finally:
        if gc_was_enabled:
            gc.enable()
    return samples


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median with the 20th and 80th percentile (linear interpolation)."""
    p20, median, p80 = np.percentile(np.asarray(samples, dtype=np.float64), [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}
