"""What a step has measured so far, and what it made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from fedkseed._checks import check_real
from fedkseed._means import mean
from fedkseed.optim.evaluation import World

#: Changes the fp64 losses [n, 2] of a step to what all ranks agree on, in place or as a tensor that it
#: returns; False: the closure's losses are those of all ranks already.
Reduce = Callable[[torch.Tensor], torch.Tensor | None] | Literal[False]


@dataclass(frozen=True)
class Plan:
    """Along which noise a step goes.

    Attributes:
        seeds: one for each direction.
        index: of the candidate seed in the pool, where there is one.
        is_drawn: whether they are the next ones of the optimizer's own sequence.
        next_seed: the first one of the step after this, where it is known.
    """

    seeds: list[int]
    index: int | None
    is_drawn: bool
    next_seed: int | None


class LastStep(NamedTuple):
    """What came out of a step.

    Attributes:
        loss: mean of the losses of both sides of all directions, fp64: NaN or infinite if a loss was.
        losses: (plus, minus) of each direction, as they were used.
        projected_grads: g of each direction, as it was used; 0 where it was skipped.
        skipped: for each direction whether it was.
    """

    loss: float
    losses: tuple[tuple[float, float], ...]
    projected_grads: tuple[float, ...]
    skipped: tuple[bool, ...]


class Measurement:
    """Losses of both sides along the seeds of one step, from one call of ``measure`` or several.

    Args:
        plan: of the step.
        start: the world when its first call began.

    Attributes:
        plan, start: as given.
        is_apart: whether others may have written since its last call.
        has_moved: whether the weights were moved or converted since its first call, and buffers with them.
    """

    def __init__(self, plan: Plan, start: World) -> None:
        self.plan = plan
        self.start = start
        self.is_apart = False
        self.has_moved = False
        self._sums = [(0.0, 0.0)] * len(plan.seeds)
        self._weight = 0.0

    def add(self, losses: Sequence[tuple[float, float]], weight: float) -> None:
        """Adds those of one call, (plus, minus) of each direction."""
        self._sums = [
            (sums[0] + weight * plus, sums[1] + weight * minus)
            for sums, (plus, minus) in zip(self._sums, losses, strict=True)
        ]
        self._weight += weight

    def losses(self) -> list[tuple[float, float]]:
        """The weighted means over the calls: added in the order of the calls, divided once."""
        return [(plus / self._weight, minus / self._weight) for plus, minus in self._sums]


def check_weight(weight: object) -> float:
    """The weight of one call of ``measure`` among those of its step.

    Raises:
        TypeError: not a real number.
        ValueError: not a finite number above 0.
    """
    number = check_real("weight", weight)
    if not 0 < number < math.inf:
        raise ValueError(
            f"expected a finite weight above 0, got {weight}; leave a batch without rows or labels out"
        )
    return number


def reduced(
    losses: Sequence[tuple[float, float]], reduce: Reduce | None
) -> tuple[list[tuple[float, float]], float]:
    """The losses of all ranks, and their mean.

    Raises:
        TypeError: ``reduce`` returned neither a tensor nor None.
        ValueError: it returned a tensor of another shape.
    """
    if callable(reduce):
        tensor = torch.tensor(losses, dtype=torch.float64, device="cpu")  # whatever the default is
        shape = tensor.shape
        returned = reduce(tensor)
        if returned is not None:
            if not isinstance(returned, torch.Tensor):
                raise TypeError(
                    "expected reduce to change the losses in place, or to return them, got "
                    f"{type(returned).__name__}"
                )
            tensor = returned.detach()
        if tensor.shape != shape:
            raise ValueError(
                f"expected reduce to leave losses of shape {tuple(shape)}, got {tuple(tensor.shape)}"
            )
        losses = [(plus, minus) for plus, minus in tensor.double().tolist()]
    return list(losses), mean((plus + minus) / 2 for plus, minus in losses)
