"""Contestants take turns; a clock says what each call costs on the GPU, and what it costs the host."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.common.measure import Contestant

Call = Callable[[], object]

#: Cycles that the GPU sleeps before a call is timed: some 5 ms, in which the host queues the whole call.
SLEEP_CYCLES = 10_000_000
_LONG_SECONDS = 0.5  # what takes longer is timed once


class Sample(NamedTuple):
    """One timed call.

    Attributes:
        seconds: from the first of its work on the device to the last.
        host_seconds: until the call returned, nothing being waited for.
        is_queued: whether the host had queued all of it before the device began: then ``seconds`` holds no
            time of the host. Not so if the call waits for the device, or launches more than a driver queues.
    """

    seconds: float
    host_seconds: float
    is_queued: bool


def on_gpu(call: Call) -> Sample:
    """A call behind a sleep that keeps the GPU busy while the host queues the call's work."""
    before, start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(3)
    )
    torch.cuda.synchronize()
    before.record()
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    begin = time.perf_counter()
    call()
    host_seconds = time.perf_counter() - begin
    end.record()
    torch.cuda.synchronize()
    slept = before.elapsed_time(start) / 1e3
    return Sample(start.elapsed_time(end) / 1e3, host_seconds, host_seconds < slept)


def on_processor(call: Call) -> Sample:
    """A call whose work is done when it returns."""
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return Sample(seconds, seconds, True)


def whole_on_gpu(call: Call) -> Sample:
    """A call with the waiting for its work: wall-clock time of what host and GPU do together."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    host_seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return Sample(time.perf_counter() - begin, host_seconds, False)


class Turns:
    """Samples of some contestants, one each in turn; iteration gives the contestant that just had its turn.

    Before its first sample a contestant is warmed up. One that raises has an error in place of samples and no
    further turn; one that takes long has no second one.

    Args:
        clock: `on_gpu`, `whole_on_gpu` or `on_processor`.
        check: called before each turn; what it raises ends the iteration.
    """

    def __init__(
        self, contestants: Sequence[Contestant], clock: Callable[[Call], Sample], check: Callable[[], None]
    ) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self.errors: dict[str, str] = {}
        self._contestants = contestants
        self._clock = clock
        self._check = check

    def __iter__(self) -> Iterator[Contestant]:
        for turn in range(max((contestant.num_samples for contestant in self._contestants), default=0)):
            for contestant in self._contestants:
                if self._is_due(contestant, turn):
                    self._check()
                    self._take(contestant)
                    yield contestant

    def _is_due(self, contestant: Contestant, turn: int) -> bool:
        if turn == 0:
            return True
        found = self.samples.get(contestant.name, [])
        return turn < contestant.num_samples and bool(found) and found[0].seconds <= _LONG_SECONDS

    def _take(self, contestant: Contestant) -> None:
        found = self.samples.setdefault(contestant.name, [])
        try:
            if not found:
                (contestant.warm_up or (lambda: contestant.run(0)))()
            found.append(self._clock(lambda: contestant.run(len(found))))
        except Exception as error:  # the other contestants' figures count all the same
            del self.samples[contestant.name]
            self.errors[contestant.name] = f"{type(error).__name__}: {error}"
            gc.collect()
            if torch.cuda.is_available():
                # Raises where the error has spoilt the context: then no later figure means anything.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
