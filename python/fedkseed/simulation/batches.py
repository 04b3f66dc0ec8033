"""A client's batches: which rows stand in each, and on which device they are when the model reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from fedkseed.federation.client import BatchT

ExampleT = TypeVar("ExampleT")

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class LocalBatches(Generic[ExampleT, BatchT]):
    """A client's batches of a round: its rows, shuffled by (seed, round, client), pass after pass.

    Attributes:
        rows, client, seed, batch_size: as named.
        collate: makes a batch of some rows.
        device: that the model reads its inputs on.
        to_device: moves a batch there; None for `moved`.
    """

    rows: Sequence[ExampleT]
    client: int
    seed: int
    batch_size: int
    collate: Callable[[Sequence[ExampleT]], BatchT]
    device: torch.device = _CPU
    to_device: Callable[[BatchT, torch.device], BatchT] | None = None

    def __call__(self, round: int, num_steps: int) -> Iterator[BatchT]:
        generator = self._generator(round)
        size = min(self.batch_size, len(self.rows))
        order: list[int] = []
        for _ in range(num_steps):
            if len(order) < size:
                order = generator.permutation(len(self.rows)).tolist()
            yield self._batch(order[:size])
            order = order[size:]

    def epochs(self, round: int, num_epochs: int) -> Iterator[BatchT]:
        """All rows of each pass, in its order; the last batch of a pass may have fewer."""
        generator = self._generator(round)
        for _ in range(num_epochs):
            order = generator.permutation(len(self.rows)).tolist()
            for start in range(0, len(order), self.batch_size):
                yield self._batch(order[start : start + self.batch_size])

    def _generator(self, round: int) -> np.random.Generator:
        return np.random.default_rng([self.seed % 2**64, round, self.client])

    def _batch(self, indices: Sequence[int]) -> BatchT:
        return self._placed(self.collate([self.rows[index] for index in indices]))

    def _placed(self, batch: BatchT) -> BatchT:
        """The batch itself where all of it is on the device, or where nothing says where it is."""
        places = set(_devices(batch)) or {_CPU}
        if places == {self.device}:
            return batch
        placed: BatchT = (self.to_device or moved)(batch, self.device)
        return placed


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device: by its own ``to``; lists, tuples and dicts item by item; others as they are."""
    if callable(move := getattr(batch, "to", None)):
        return move(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def _devices(batch: Any) -> Iterator[torch.device]:
    """The devices of the tensors in a batch, as far as they can be seen."""
    if isinstance(batch, torch.Tensor):
        yield batch.device
        return
    values: Any = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (list, tuple)):
        values = batch
    elif dataclasses.is_dataclass(batch):
        values = vars(batch).values()
    for value in values:
        yield from _devices(value)
