"""The storage mode that perturbs the stored weights themselves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

import fedkseed_kernels
from fedkseed.storage.interface import Direction, Evaluation, GroupUpdate, TunedWeights


@dataclass(frozen=True)
class Inplace:
    """Perturbs the stored weights and takes it back: no memory beyond them (`InplaceStorage`)."""

    def open(self, weights: TunedWeights) -> InplaceStorage:
        """See `StorageOptions.open`."""
        return InplaceStorage(weights)


class InplaceStorage:
    """Passes in place, 2 n + 1 for n seeds: the fewest that visit all points and come back.

    To w + eps z_1; to w - eps z_1; to w + eps z_2, restoring and perturbing in one pass with two terms; and
    so on; last from w - eps z_n with n terms, restore and update in one:

        w <- alpha w + sum_i c_i z_i,  c_i = -(lr g_i) / n, and c_n = alpha eps - (lr g_n) / n

    No memory beyond the weights. Every pass rounds to the weights' dtype.

    Raises:
        TypeError, ValueError: what the kernels refuse: a dtype, tensors that overlap, devices that are mixed.
    """

    def __init__(self, weights: TunedWeights) -> None:
        self._tensors = [tensor for group in weights.groups for tensor in group]
        self._streams = [stream for group in weights.streams for stream in group]
        self._family = weights.family
        self._whole = fedkseed_kernels.prepare(self._tensors, streams=self._streams, family=weights.family)
        self._groups = (
            [self._whole]
            if len(weights.groups) == 1
            else [
                fedkseed_kernels.prepare(list(group), streams=list(streams), family=weights.family)
                for group, streams in zip(weights.groups, weights.streams, strict=True)
            ]
        )
        self._eps = weights.eps
        self._seed = 0
        self._offset = 0.0  # the weights stand at w + offset z(seed)

    def walk(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        evaluation: Evaluation,
        project: Callable[[float, float], float | None],
        record: Callable[[list[Direction]], None],
        next_seed: int | None = None,
    ) -> list[Direction]:
        """See `Storage.walk`."""
        directions = []
        try:
            for seed in seeds:
                self._move(seed, self._eps)
                plus = evaluation.side()
                self._move(seed, -self._eps)
                minus = evaluation.side()
                directions.append(Direction(plus, minus, project(plus, minus)))
            with _interrupts_held():
                self._update(seeds, updates, directions)
                record(directions)
        except BaseException:
            self._restore()
            raise
        return directions

    def flush(self) -> None:
        """Nothing waits: every step takes its perturbation back."""

    def state(self) -> dict[str, Any]:
        """Empty: the weights are all there is."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Storage.load_state`."""
        if state:
            raise ValueError(f"expected an empty state of weights perturbed in place, got {sorted(state)}")

    def _move(self, seed: int, offset: float) -> None:
        """To w + offset z(seed) from where the weights stand."""
        if seed == self._seed or not self._offset:
            seeds, coeffs = [seed], [offset - self._offset]
        else:
            seeds, coeffs = [self._seed, seed], [-self._offset, offset]
        with _interrupts_held():
            self._whole.seed_axpy_(seeds, coeffs)
            self._seed, self._offset = seed, offset

    def _update(
        self, seeds: Sequence[int], updates: Sequence[GroupUpdate], directions: list[Direction]
    ) -> None:
        if all(direction.g is None for direction in directions):
            updates = [GroupUpdate(lr=0.0)] * len(updates)
        gradients = [0.0 if direction.g is None else direction.g for direction in directions]
        all_coeffs = [self._coefficients(update, gradients) for update in updates]
        if len(set(updates)) == 1:
            self._whole.seed_axpy_(seeds, all_coeffs[0], alpha=updates[0].alpha)
        else:
            self._whole.seed_axpy_([], [])  # moves nothing: all are in place, before the first is updated
            for group, update, coeffs in zip(self._groups, updates, all_coeffs, strict=True):
                group.seed_axpy_(seeds, coeffs, alpha=update.alpha)
        self._offset = 0.0

    def _coefficients(self, update: GroupUpdate, gradients: list[float]) -> list[float]:
        coeffs = [-(update.lr * g) / len(gradients) for g in gradients]
        coeffs[-1] += update.alpha * -self._offset
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.array(coeffs).astype(np.float32))
        if not finite.all():
            raise ValueError(
                f"expected an update that is finite in fp32, got lr {update.lr} times g {gradients}; "
                "lower lr or set max_abs_g"
            )
        return coeffs

    def _restore(self) -> None:
        """Takes the perturbation back wherever the tensors are now, for they may be what was changed."""
        if self._offset:
            with _interrupts_held():
                fedkseed_kernels.perturb_(
                    self._tensors, self._seed, -self._offset, streams=self._streams, family=self._family
                )
                self._offset = 0.0


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
