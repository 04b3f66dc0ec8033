"""What a run needs of a kind of data: batches and a loss for the clients, scores before, within and after."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fedkseed.data.asking import Asking
from fedkseed.data.federated import FederatedData
from fedkseed.simulation.memory_plan import BatchShape
from fedkseed.simulation.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Bench(Protocol):
    """The model, the rows of each client as tokens, and how they are scored.

    Scores are dictionaries that are ready for JSON.

    Attributes:
        model: as it stands; tuned in place.
        names: of the clients.
        notes: what was cut or dropped as rows became tokens, a line each.
        asking: how the tuned model is asked.
        digest: of all rows as tokens, so that a resumed run can tell other rows.
        rows_digest: of all rows as texts: the same for every template and tokenizer, so that runs that are
            compared can be told to have the same data.
    """

    model: PreTrainedModel
    digest: str
    rows_digest: str
    asking: Asking

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def notes(self) -> Sequence[str]: ...

    def task(self) -> Task[Any, Any]:
        """What the federation trains; its ``evaluate`` is `round_scores`."""

    def gradient_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The task's loss of one batch, one element, for a backward pass."""

    def batch_shapes(self, batch_size: int) -> tuple[list[BatchShape], list[BatchShape]]:
        """The largest batches of the clients' steps, and of what is scored: for the plan of memory."""

    def round_scores(self, round: int) -> dict[str, float]:
        """Scores of the model as it stands, on few rows: "held_out_loss" among them."""

    def scores(self) -> dict[str, Any]:
        """Scores of the model as it stands, on all rows that are looked at before and after."""

    def table(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        """Both beside each other, and beside what needs no training, as text."""

    def summary(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        """The same, by name."""

    def draw(
        self,
        target: Path,
        rounds: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any],
        weight_bytes: int,
    ) -> None:
        """Writes a picture of the run as a PNG.

        Args:
            target: the file.
            rounds: the metrics of at least one round.
            summary: what `summary` gave.
            weight_bytes: of all weights: what FedAvg sends each way for every client and round.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """


def rows_digest_of(data: FederatedData, final_rows: int) -> str:
    """A hash of what is trained on and what is scored, whatever the template.

    Args:
        data: of the run.
        final_rows: held-out rows of each client that are scored.
    """
    held_out = [[client.held_out[:final_rows] for client in part] for part in (data.clients, data.unseen)]
    return digest_of([client.train for client in data.clients], *held_out)


def digest_of(*groups: Iterable[Iterable[Any]]) -> str:
    """A hash of rows by client, each row an object whose `repr` says all of it."""
    digest = hashlib.sha256()
    for group in groups:
        for rows in group:
            for row in rows:
                digest.update(repr(row).encode())
            digest.update(b"client")
        digest.update(b"group")
    return digest.hexdigest()
