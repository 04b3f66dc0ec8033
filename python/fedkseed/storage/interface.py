"""What the optimizer and a storage mode ask of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


class GroupUpdate(NamedTuple):
    """w <- alpha w - lr (mean over the directions of g z), for the tensors of one group; alpha is fp32."""

    lr: float
    alpha: float = 1.0


class Direction(NamedTuple):
    """What was measured along the noise of one seed; g is None if the direction is skipped."""

    plus: float
    minus: float
    g: float | None


@dataclass(frozen=True)
class TunedWeights:
    """What a storage mode is made for.

    Attributes:
        groups: the weights, changed in place.
        streams: the noise stream of each.
        eps: an fp32 value, the scale of the perturbation.
        family: of the noise.
        seed: of the optimizer; rounding seeds derive from it.
        model: whose forward pass reads the weights; None if the optimizer was given tensors alone.
    """

    groups: Sequence[Sequence[torch.Tensor]]
    streams: Sequence[Sequence[int]]
    eps: float
    family: str
    seed: int
    model: nn.Module | None


class Evaluation(Protocol):
    """The closure as a storage mode sees it; every call starts from the same state of torch's generators."""

    def side(self) -> float:
        """The loss at the weights as they stand."""

    def both(self) -> tuple[float, float]:
        """The losses of the halves of a paired batch: (plus, minus)."""


class Storage(Protocol):
    """The weights as the optimizer sees them."""

    def walk(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        evaluation: Evaluation,
        project: Callable[[float, float], float | None],
        record: Callable[[list[Direction]], None],
        next_seed: int | None = None,
    ) -> list[Direction]:
        """One step: both sides of w along every seed's noise, then one update along all of them.

        The closure is evaluated at w + eps z and at w - eps z of each seed in turn; ``project`` makes g of
        the two losses. A skipped direction counts as g = 0; if all are skipped nothing is updated, alpha
        included.

        ``record`` is called once the update is made: whatever interrupts, both have happened or neither. If
        the closure or ``project`` raises, the weights are as they were (up to the rounding of the passes
        made), and the exception goes on.

        Args:
            seeds: at least one.
            updates: one for each group of tensors.
            next_seed: the first seed of the step after this one, where it is known.

        Raises:
            ValueError: the update is not finite in fp32.
        """

    def flush(self) -> None:
        """Takes back a perturbation that waits for the next step; harmless when there is none."""

    def state(self) -> dict[str, Any]:
        """What a storage mode needs, beside the weights, to go on with the same bits."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ValueError: not a state of this mode; nothing changes.
        """


class StorageOptions(Protocol):
    """A storage mode as users choose it: a frozen dataclass, told apart by its repr."""

    def open(self, weights: TunedWeights) -> Storage:
        """The mode at work on these weights.

        Raises:
            TypeError, ValueError: it cannot serve them; says which and why.
        """
