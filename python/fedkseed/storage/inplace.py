"""The storage mode that perturbs the stored weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import fedkseed_kernels
from fedkseed.storage.interface import Direction, Evaluation, GroupUpdate, TunedWeights
from fedkseed.storage.updates import GroupedWeights, interrupts_held


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
        self._weights = GroupedWeights(weights)
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
            with interrupts_held():
                self._weights.update(seeds, updates, directions, self._offset)
                self._offset = 0.0
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
        with interrupts_held():
            self._weights.whole.seed_axpy_(seeds, coeffs)
            self._seed, self._offset = seed, offset

    def _restore(self) -> None:
        """Takes the perturbation back wherever the tensors are now, for they may be what was changed."""
        if self._offset:
            with interrupts_held():
                fedkseed_kernels.perturb_(
                    self._tensors, self._seed, -self._offset, streams=self._streams, family=self._family
                )
                self._offset = 0.0
