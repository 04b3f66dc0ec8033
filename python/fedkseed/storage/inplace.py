"""The storage mode that perturbs the stored weights themselves, and the passes that move them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import fedkseed_kernels
from fedkseed.model.named_errors import errors_named
from fedkseed.model.placement import Places, by_device
from fedkseed.model.waiting import flush_before_reads
from fedkseed.storage.interface import Evaluation, GroupUpdate, TunedWeights
from fedkseed.storage.updates import (
    GroupedWeights,
    RoundingSeeds,
    Written,
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
    after a measurement apart at w - eps z_n for the update. A read has to flush them first: back to w, which
    rounds once more, so that a run that is looked at has other bits than one that is not. Flushing are

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

    def prepare(self) -> bool:
        """See `Storage.prepare`."""
        return self._weights.prepare()

    def measure(
        self, seeds: Sequence[int], evaluation: Evaluation, is_apart: bool
    ) -> list[tuple[float, float]]:
        """See `Storage.measure`; apart it restores, which is one pass more, or waits at a side if chained."""
        weights = self._weights
        weights.is_waiting = False
        losses = []
        for seed in seeds:
            weights.move(seed, self._eps)
            plus = evaluation.side()
            weights.move(seed, -self._eps)
            losses.append((plus, evaluation.side()))
        if is_apart:
            if self._options.chained:
                weights.is_waiting = True
            else:
                weights.move(seeds[-1], 0.0)
            weights.written.note()
        return losses

    def update(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        gs: Sequence[float | None],
        next_seed: int | None = None,
    ) -> None:
        """See `Storage.update`."""
        following = (next_seed, self._eps) if self._options.chained and next_seed is not None else None
        self._weights.update(seeds, updates, gs, following)

    def check_unwritten(self) -> None:
        """See `Storage.check_unwritten`."""
        self._weights.written.check()

    def restore(self) -> None:
        """See `Storage.restore`."""
        self._weights.restore()

    def state(self) -> dict[str, Any]:
        """How many passes were made, which rounding seeds count; empty if rounding is to nearest."""
        return self._weights.rounding_seeds.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Storage.load_state`."""
        loaded = RoundingSeeds(self._seed, self._options.rounding)
        loaded.load_state(state)
        self._weights.restore()
        self._weights.rounding_seeds = loaded


class PerturbedWeights:
    """Stored weights that stand at w + offset z(seed); every method is one pass over them, or none.

    Args:
        weights: w as they stand now.
        rounding_seeds: one for each pass.

    Attributes:
        tensors: the weights.
        written: whether others have written to them.
        rounding_seeds: as given; count the passes.
        seed, offset: where they stand; at offset 0 that is w, whatever the seed.
        is_waiting: whether they stand there for a step to come.

    Raises:
        TypeError, ValueError: as `GroupedWeights`.
    """

    def __init__(self, weights: TunedWeights, rounding_seeds: RoundingSeeds) -> None:
        self.tensors = [tensor for group in weights.groups for tensor in group]
        self._names = [name for names in weights.names for name in names]
        self.written = Written(self._names, self.tensors)
        self.rounding_seeds = rounding_seeds
        self._tuned = weights
        self._places = Places(self.tensors, self._names)
        self._groups = GroupedWeights(weights)
        self._lock = threading.RLock()
        self.seed = 0
        self.offset = 0.0
        self.is_waiting = False

    def prepare(self) -> bool:
        """Prepares weights again that were moved, wherever they stand; whether any were.

        Raises:
            RuntimeError: as `Places.have_changed`.
            TypeError, ValueError: as at construction.
        """
        have_moved = self._places.have_changed()
        if have_moved:
            self._groups = GroupedWeights(self._tuned)
            self._places = Places(self.tensors, self._names)
        return have_moved

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
        gs: Sequence[float | None],
        following: tuple[int, float] | None,
    ) -> None:
        """`GroupedWeights.update` from where the weights stand, at an offset along the last of ``seeds``.

        Args:
            following: the seed and the offset at which the weights wait afterwards; at w itself if None.
        """
        with self._pass() as rounding_seed:
            self._groups.update(seeds, updates, gs, self.offset, rounding_seed, following)
            self.seed, self.offset = following or (self.seed, 0.0)
            self.is_waiting = following is not None

    def restore(self) -> None:
        """Moves back to w, wherever the tensors are now, for they may be what was changed."""
        with self._lock, torch.no_grad():
            if self.offset:
                is_written = self.written.is_seen()
                with self._pass() as rounding_seed:
                    self._move_anywhere(-self.offset, rounding_seed)
                    self.offset = 0.0
                    self.is_waiting = False
                if not is_written:
                    self.written.note()

    def flush(self) -> None:
        """Moves back to w if they wait for a step; threads that read them may all call this."""
        with self._lock:
            if self.is_waiting:
                self.restore()

    def _move_anywhere(self, offset: float, rounding_seed: int | None) -> None:
        streams = [stream for group in self._tuned.streams for stream in group]
        for positions in by_device(self.tensors).values():
            with errors_named([self._names[position] for position in positions]):
                fedkseed_kernels.perturb_(
                    [self.tensors[position] for position in positions],
                    self.seed,
                    offset,
                    streams=[streams[position] for position in positions],
                    family=self._tuned.family,
                    **rounding_options(rounding_seed),
                )

    @contextmanager
    def _pass(self) -> Iterator[int | None]:
        """A pass and the note of it, without Ctrl-C between them; yields its rounding seed."""
        (rounding_seed,) = self.rounding_seeds.next(1)
        with interrupts_held():
            yield rounding_seed
            self.rounding_seeds.advance(1)
