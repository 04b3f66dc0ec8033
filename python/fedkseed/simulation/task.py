"""What a federation on one machine trains."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import nn

from fedkseed.federation.client import BatchT, Client
from fedkseed.federation.limits import ClientLimits
from fedkseed.federation.scoring import Evaluate, scores_of
from fedkseed.federation.server import Server
from fedkseed.model.placement import input_device
from fedkseed.model.working_copy import WorkingCopy
from fedkseed.optim.evaluation import Losses
from fedkseed.seeds import SeedPool
from fedkseed.simulation.batches import ExampleT, LocalBatches
from fedkseed.simulation.config import SimulationConfig, check_simulation_config
from fedkseed.storage import StorageChoice


@dataclass(frozen=True)
class Task(Generic[ExampleT, BatchT]):
    """What a federation trains: a model, and the rows of each client.

    Attributes:
        model: its weights as they stand are w0. Tuned in place, on the device where they are.
        datasets: the training rows of each client, at least one each.
        collate: a batch from some rows.
        loss: of the model on a batch, a number or a tensor of one element; with a paired storage mode both
            losses, (plus, minus), of the batch run twice in one forward pass (`fedkseed.paired_losses`).
        data_sizes: of each client, its weight if clients are weighted by data size; its number of rows if
            None.
        evaluate: named scores of the model after a round, from (model, round), called without gradients; None
            to leave it out.
        to_device: moves a batch to the model's device where it is on another; if None, it is moved by its own
            ``to``, a list, tuple or dict item by item, and anything else stays as it is.

    Raises:
        ValueError: a client without data, or not one data size a client.
    """

    model: nn.Module
    datasets: Sequence[Sequence[ExampleT]]
    collate: Callable[[Sequence[ExampleT]], BatchT]
    loss: Callable[[nn.Module, BatchT], Losses]
    data_sizes: Sequence[int] | None = None
    evaluate: Evaluate | None = None
    to_device: Callable[[BatchT, torch.device], BatchT] | None = None

    def __post_init__(self) -> None:
        for client, rows in enumerate(self.datasets):
            if len(rows) == 0:
                raise ValueError(
                    f"expected training rows of every client, got none of client {client}; leave it out"
                )
        if self.data_sizes is not None and len(self.data_sizes) != len(self.datasets):
            raise ValueError(
                f"expected one data size for each of {len(self.datasets)} clients, got {len(self.data_sizes)}"
            )

    def scores(self, round: int) -> dict[str, float | None]:
        """What ``evaluate`` finds after a round, None for values that are not finite.

        Raises:
            TypeError: it returned no numbers by name.
        """
        if self.evaluate is None:
            return {}
        return scores_of(self.evaluate, self.model, round)

    def data_size(self, client: int) -> int:
        """What the client's reply weighs.

        Raises:
            TypeError, IndexError: as `client`.
        """
        client = self._known(client)
        return len(self.datasets[client]) if self.data_sizes is None else self.data_sizes[client]

    def server(self, config: SimulationConfig) -> Server:
        """Exactly the server of a `Simulation` of this task, but that it draws its run id from the system.

        The model's weights have to be w0 as yet; the model is not kept.

        Raises:
            TypeError, ValueError: as `ModelIdentity.of`, and as `SimulationConfig.server_config`.
        """
        check_simulation_config(config)
        pool = SeedPool(config.seed, config.num_seeds)
        return Server.of(self.model, pool, config.server_config(len(self.datasets)))

    def client(
        self,
        number: int,
        working: WorkingCopy | None,
        config: SimulationConfig,
        *,
        pool: SeedPool | None = None,
        storage: StorageChoice | None = None,
        on_step: Callable[[], None] | None = None,
        limits: ClientLimits | None = None,
    ) -> Client[BatchT]:
        """Exactly the client of that number of a `Simulation` of this task: its replies have the same bytes.

        Whatever carries the messages, a federation over these clients ends with the simulation's ledger.

        Args:
            number: of the client.
            working: the model that it tunes; clients of one process may share it. None: the task's model,
                in a working copy made here.
            config: of the run; server and clients take the same one.
            pool: the candidate seeds; those of the config if None.
            storage: in place of the config's.
            on_step: called after each local step.
            limits: see `fedkseed.Client`.

        Raises:
            IndexError: the task has no such client.
            TypeError: a number that is none, or an argument of another class.
        """
        check_simulation_config(config)
        number = self._known(number)
        rows = self.datasets[number]
        working = working or WorkingCopy(self.model)
        batches = LocalBatches(
            rows,
            number,
            config.seed,
            config.batch_size,
            self.collate,
            input_device(working.model),
            self.to_device,
        )
        return Client(
            number,
            working,
            pool or SeedPool(config.seed, config.num_seeds),
            loss=self.loss,
            batches=batches,
            data_size=self.data_size(number),
            on_step=on_step,
            storage=config.storage if storage is None else storage,
            max_loss_gap=config.max_loss_gap or None,
            seed=config.seed,
            num_threads=config.num_threads,
            limits=limits,
            evaluate=self.evaluate,
        )

    def _known(self, client: int) -> int:
        """The number of a client of this task; a negative one does not count from the end."""
        if isinstance(client, bool) or not isinstance(client, numbers.Integral):
            raise TypeError(f"expected the number of a client, got {client!r}")
        if client not in range(len(self.datasets)):
            raise IndexError(
                f"expected a client out of 0 .. {len(self.datasets) - 1}, for which the task has rows, got "
                f"{client}; add its dataset to the task, or name one of these"
            )
        return int(client)
