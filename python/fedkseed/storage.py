"""How a zeroth-order step visits both sides of the weights: one interface, `Storage`.

`InplaceStorage` perturbs the stored weights themselves.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import numpy as np
import torch

import fedkseed_kernels


class Storage(Protocol):
    """What the optimizer asks of the weights."""

    def walk(
        self, seed: int, lr: float, evaluate: Callable[[], float], record: Callable[[float], None]
    ) -> tuple[float, float]:
        """(L+, L-) of one seed, ``evaluate`` called on either side in this order; then w <- w - lr g z.

        ``record(g)`` is called once the update is made: whatever interrupts, both have happened or neither.
        If g is not finite nothing is updated, but it is recorded. If ``evaluate`` raises, the weights are as
        they were (up to the rounding of the passes made), and the exception goes on.
        """


class InplaceStorage:
    """Three passes in place: to w + eps z, to w - eps z, then restore and update in one, + (eps - lr g) z.

    No memory beyond the weights. Every pass rounds to the weights' dtype.

    Args:
        tensors: the weights, moved in place.
        streams: the noise stream of each.
        eps: an fp32 value.

    Raises:
        TypeError, ValueError: what the kernels refuse: a dtype, tensors that overlap, devices that are mixed.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], streams: Sequence[int], eps: float) -> None:
        self._prepared = fedkseed_kernels.prepare(list(tensors), streams=list(streams))
        self._eps = eps
        self._offset = 0.0  # the weights stand at w + offset z

    def walk(
        self, seed: int, lr: float, evaluate: Callable[[], float], record: Callable[[float], None]
    ) -> tuple[float, float]:
        """See `Storage.walk`."""
        eps = self._eps
        try:
            self._move(seed, eps, offset=eps)
            plus = evaluate()
            self._move(seed, -2 * eps, offset=-eps)
            minus = evaluate()
            g = projected_gradient(plus, minus, eps)
            with _interrupts_held():
                self._move(seed, eps - lr * g if math.isfinite(g) else eps, offset=0.0)
                record(g)
        except BaseException:
            if self._offset:
                self._move(seed, -self._offset, offset=0.0)
            raise
        return plus, minus

    def _move(self, seed: int, scale: float, offset: float) -> None:
        with _interrupts_held():
            self._prepared.perturb_(seed, scale)
            self._offset = offset


def projected_gradient(plus: float, minus: float, eps: float) -> float:
    """g = fp32((L+ - L-) / (2 eps)) from fp64 losses; not finite if a loss is not or it is beyond fp32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.float32((np.float64(plus) - np.float64(minus)) / (2 * eps)))


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delays Ctrl-C until a pass over the weights and the note of what it did are done; may be nested."""
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous) or threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets a KeyboardInterrupt
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[-1])
