"""Weights that are perturbed where they are stored, and the passes that move them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import fedkseed_kernels
from fedkseed.storage.interface import Direction, GroupUpdate, TunedWeights
from fedkseed.storage.rounding import RoundingSeeds
from fedkseed.storage.updates import GroupedWeights, interrupts_held


class PerturbedWeights:
    """Stored weights that stand at w + offset z(seed); every method is one pass over them, or none.

    Args:
        weights: w as they stand now.
        rounding_seeds: one for each pass.

    Attributes:
        tensors: the weights.
        rounding_seeds: as given; count the passes.
        seed, offset: where they stand; at offset 0 that is w, whatever the seed.
        is_waiting: whether they stand there for a step to come.

    Raises:
        TypeError, ValueError: as `GroupedWeights`.
    """

    def __init__(self, weights: TunedWeights, rounding_seeds: RoundingSeeds) -> None:
        self.tensors = [tensor for group in weights.groups for tensor in group]
        self.rounding_seeds = rounding_seeds
        self._streams = [stream for group in weights.streams for stream in group]
        self._family = weights.family
        self._groups = GroupedWeights(weights)
        self._lock = threading.Lock()
        self.seed = 0
        self.offset = 0.0
        self.is_waiting = False

    def move(self, seed: int, offset: float) -> None:
        """To w + offset z(seed); no pass if they stand there."""
        if (seed, offset) == (self.seed, self.offset):
            return
        if seed == self.seed or not self.offset:
            seeds, coeffs = [seed], [offset - self.offset]
        else:
            seeds, coeffs = [self.seed, seed], [-self.offset, offset]
        with self._pass() as rounding_seed:
            self._groups.whole.seed_axpy_(seeds, coeffs, **_rounding(rounding_seed))
            self.seed, self.offset = seed, offset

    def update(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        directions: Sequence[Direction],
        following: tuple[int, float] | None,
    ) -> None:
        """`GroupedWeights.update` from where the weights stand, at an offset along the last of ``seeds``.

        Args:
            following: the seed and the offset at which the weights wait afterwards; at w itself if None.
        """
        with self._pass() as rounding_seed:
            self._groups.update(seeds, updates, directions, self.offset, rounding_seed, following)
            self.seed, self.offset = following or (self.seed, 0.0)
            self.is_waiting = following is not None

    def restore(self) -> None:
        """Back to w, wherever the tensors are now, for they may be what was changed."""
        if self.offset:
            with torch.no_grad(), self._pass() as rounding_seed:
                fedkseed_kernels.perturb_(
                    self.tensors,
                    self.seed,
                    -self.offset,
                    streams=self._streams,
                    family=self._family,
                    **_rounding(rounding_seed),
                )
                self.offset = 0.0
                self.is_waiting = False

    def flush(self) -> None:
        """Back to w if they wait for a step; threads that read them may all call this."""
        with self._lock:
            if self.is_waiting:
                self.restore()

    @contextmanager
    def _pass(self) -> Iterator[int | None]:
        """A pass and the note of it, without Ctrl-C between them; yields its rounding seed."""
        (rounding_seed,) = self.rounding_seeds.next(1)
        with interrupts_held():
            yield rounding_seed
            self.rounding_seeds.advance(1)


def _rounding(rounding_seed: int | None) -> dict[str, Any]:
    return {
        "rounding": "nearest" if rounding_seed is None else "stochastic",
        "rounding_seed": rounding_seed,
    }
