"""The storage mode that perturbs the stored weights themselves, and the passes that move them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import fedkseed_kernels
from fedkseed.model.placement import by_device
from fedkseed.model.waiting import flush_before_reads
from fedkseed.storage.interface import Direction, Evaluation, GroupUpdate, TunedWeights
from fedkseed.storage.updates import (
    GroupedWeights,
    RoundingSeeds,
    check_rounding,
    interrupts_held,
    rounding_options,
)


@dataclass(frozen=True)
class Inplace:
    """Perturbs the stored weights and takes it back: no memory beyond them (`InplaceStorage`).

    Attributes:
        chained: leave the weights perturbed for the next step, which saves one pass over them a step.
            Needs a model. Every read through the model, and ``optimizer.flush()``, cleans them first.
        rounding: of every pass over weights of 16 bits, "nearest" or "stochastic" (contract, section 8);
            wider ones are stored as they are.

    Raises:
        TypeError, ValueError: a field of another type or none of its choices.
    """

    chained: bool = False
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if not isinstance(self.chained, bool):
            raise TypeError(f"expected chained as True or False, got {self.chained!r}")
        check_rounding(self.rounding)

    def open(self, weights: TunedWeights) -> InplaceStorage:
        """See `StorageOptions.open`."""
        return InplaceStorage(weights, self)


class InplaceStorage:
    """Passes in place, 2 n + 1 for n seeds: the fewest that visit all points and come back.

    To w + eps z_1; to w - eps z_1; to w + eps z_2, restoring and perturbing in one pass with two terms; and
    so on; last from w - eps z_n with n terms, restore and update in one:

        w <- alpha w + sum_i c_i z_i,  c_i = -(lr g_i) / n, and c_n = alpha eps - (lr g_n) / n

    No memory beyond the weights. Every pass rounds to the weights' dtype.

    Chained, the last pass has one more term, + eps z of the next step's first seed, where that is known: the
    next step finds its perturbation made, and costs 2 n passes. In between the weights wait at w + eps z, and
    a read has to flush them first: back to w, which rounds once more, so that a run that is looked at has
    other bits than one that is not. Flushing are

    * the optimizer's ``flush`` and ``state_dict``, and its end;
    * a forward, ``state_dict`` or ``load_state_dict`` of the model or of any of its modules;
    * what this package reads and writes itself (`fedkseed.ModelIdentity`, `fedkseed.WorkingCopy`).

    A copy of the model (``copy.deepcopy``, a pickle) is refused while they wait. Nobody sees a parameter read
    or written directly (``model.head.weight.norm()``, an average of weights, a ``state_dict`` taken earlier,
    whose tensors are the parameters), nor a forward compiled from the model before the optimizer was made (it
    has to be given the compiled model): there call ``optimizer.flush()`` first.

    Raises:
        TypeError, ValueError: as `GroupedWeights`.
        ValueError: chained without a model.
    """

    def __init__(self, weights: TunedWeights, options: Inplace) -> None:
        if options.chained and weights.model is None:
            raise ValueError(
                "expected a model for Inplace(chained=True), got tensors alone: their weights stay perturbed "
                "between steps, and only the model tells when they are read; give the optimizer the model, "
                "or take Inplace()"
            )
        self._weights = PerturbedWeights(weights, RoundingSeeds(weights.seed, options.rounding))
        self._seed = weights.seed
        self._eps = weights.eps
        self._options = options
        if options.chained and weights.model is not None:
            flush_before_reads(weights.model, self._weights, self)

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
        weights = self._weights
        following = (next_seed, self._eps) if self._options.chained and next_seed is not None else None
        directions = []
        try:
            weights.is_waiting = False
            for seed in seeds:
                weights.move(seed, self._eps)
                plus = evaluation.side()
                weights.move(seed, -self._eps)
                minus = evaluation.side()
                directions.append(Direction(plus, minus, project(plus, minus)))
            with interrupts_held():
                weights.update(seeds, updates, directions, following)
                record(directions)
        except BaseException:
            weights.restore()
            raise
        return directions

    def flush(self) -> None:
        """See `Storage.flush`; only chained steps leave something to take back."""
        self._weights.flush()

    def state(self) -> dict[str, Any]:
        """How many passes were made, which rounding seeds count; empty if rounding is to nearest."""
        return self._weights.rounding_seeds.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Storage.load_state`; weights that wait for a step are flushed first."""
        loaded = RoundingSeeds(self._seed, self._options.rounding)
        loaded.load_state(state)
        self._weights.flush()
        self._weights.rounding_seeds = loaded


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
        """Moves to w + offset z(seed); no pass if they stand there."""
        if (seed, offset) == (self.seed, self.offset):
            return
        if seed == self.seed or not self.offset:
            seeds, coeffs = [seed], [offset - self.offset]
        else:
            seeds, coeffs = [self.seed, seed], [-self.offset, offset]
        with self._pass() as rounding_seed:
            self._groups.whole.seed_axpy_(seeds, coeffs, **rounding_options(rounding_seed))
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
        """Moves back to w, wherever the tensors are now, for they may be what was changed."""
        if self.offset:
            with torch.no_grad(), self._pass() as rounding_seed:
                for positions in by_device(self.tensors).values():
                    fedkseed_kernels.perturb_(
                        [self.tensors[position] for position in positions],
                        self.seed,
                        -self.offset,
                        streams=[self._streams[position] for position in positions],
                        family=self._family,
                        **rounding_options(rounding_seed),
                    )
                self.offset = 0.0
                self.is_waiting = False

    def flush(self) -> None:
        """Moves back to w if they wait for a step; threads that read them may all call this."""
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
