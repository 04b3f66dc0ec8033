"""What the optimizer and a storage mode ask of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

#: Dtypes of weights that a pass rounds noticeably.
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class GroupUpdate(NamedTuple):
    """w <- alpha w - lr (mean over the directions of g z), for the tensors of one group; alpha is fp32."""

    lr: float
    alpha: float = 1.0


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
        names: of each of the weights, for messages.
    """

    groups: Sequence[Sequence[torch.Tensor]]
    streams: Sequence[Sequence[int]]
    eps: float
    family: str
    seed: int
    model: nn.Module | None
    names: Sequence[Sequence[str]]


class Evaluation(Protocol):
    """The closure as a storage mode sees it; every call meets the same world beside the weights."""

    def side(self) -> float:
        """The loss at the weights as they stand."""

    def both(self) -> tuple[float, float]:
        """The losses of the halves of a paired batch: (plus, minus)."""


class Storage(Protocol):
    """The weights as the optimizer sees them.

    A step is one `measure` or several along the same seeds, then an `update`. Whoever calls these calls
    `restore` if anything raises in between, and makes `update` and its own note of it one: no signal may come
    between them.
    """

    def prepare(self) -> bool:
        """Prepares weights again that were moved in memory, to another device or dtype; whether any were.

        Called before `measure`, and before an `update` that others came in front of.

        Raises:
            RuntimeError, TypeError, ValueError: they cannot be served as they are now.
        """

    def measure(
        self, seeds: Sequence[int], evaluation: Evaluation, is_apart: bool
    ) -> list[tuple[float, float]]:
        """The losses at w + eps z and at w - eps z of each seed in turn: (plus, minus).

        Args:
            seeds: at least one.
            is_apart: whether others may read the weights before the update: they meet w then. Otherwise the
                weights may be left at the last side.
        """

    def update(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        gs: Sequence[float | None],
        next_seed: int | None = None,
    ) -> None:
        """One update along all seeds, from wherever the weights were left.

        Args:
            seeds: those measured.
            updates: one for each group of tensors.
            gs: the projected gradient of each seed; None, for one that is skipped, counts as 0. If all are
                skipped nothing is updated, alpha included.
            next_seed: the first seed of the step after this one, where it is known.

        Raises:
            ValueError: the update is not finite in fp32; nothing has changed.
        """

    def check_unwritten(self) -> None:
        """Moves nothing.

        Raises:
            RuntimeError: weights were written since they were measured apart; names the first.
        """

    def restore(self) -> None:
        """Takes the weights back to w, from a side or from where they wait for the next step."""

    def state(self) -> dict[str, Any]:
        """What a storage mode needs, beside the weights, to go on with the same bits."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; weights that wait for a step are restored first.

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
