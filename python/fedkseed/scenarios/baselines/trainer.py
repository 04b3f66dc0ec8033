"""What a method does with a client's batches: the seam between its rounds and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import nn

from fedkseed.storage import StorageOptions


class Step(NamedTuple):
    """A local step: its loss, and whether it was left out since that is not finite."""

    loss: float
    is_skipped: bool


class Trainer(Protocol):
    """An optimizer around a model.

    Attributes:
        parameters: what it tunes, by name: what travels in a federation, and what is kept.
        storage: how it visits both sides of the weights; None if it takes gradients.
    """

    parameters: Mapping[str, nn.Parameter]

    @property
    def storage(self) -> StorageOptions | None: ...

    def begin(self, *entropy: int) -> None:
        """An optimizer without a past; what it draws derives from the run's seed and these numbers."""

    def at_work(self) -> AbstractContextManager[None]:
        """A context of local steps: the model as they have it within, as it is evaluated after."""

    def step(self, batch: Any) -> Step:
        """One step on a batch."""

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, of tensors and of what JSON has."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: it is of another optimizer.
        """
