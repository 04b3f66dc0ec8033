"""Clients that one machine hosts, and their rounds in this process.

`worker_pool` runs them in several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol

from fedkseed.federation.client import BatchT, Client, LocalRun
from fedkseed.federation.messages import Broadcast
from fedkseed.model.placement import input_device
from fedkseed.model.randomness import seeded
from fedkseed.model.working_copy import WorkingCopy
from fedkseed.seeds import SeedPool
from fedkseed.simulation.batches import LocalBatches
from fedkseed.simulation.task import ExampleT, Task
from fedkseed.storage import DEFAULT_STORAGE, StorageChoice


@dataclass(frozen=True)
class ClientRun:
    """One client's part in one round.

    Attributes:
        reply: its message; None if it failed.
        local: what it saw; None if it failed.
        error: why it failed, one line; None if it did not.
        seconds_reset: time to set the working copy to the round's model.
    """

    reply: bytes | None
    local: LocalRun | None
    error: str | None
    seconds_reset: float


class Host(Protocol):
    """Runs the clients of one machine.

    Attributes:
        storage: how clients visit both sides of the weights; may change between rounds.
    """

    storage: StorageChoice

    def run(self, messages: Mapping[int, bytes], on_step: Callable[[], None]) -> dict[int, ClientRun]:
        """One round: each client's broadcast in, its outcome out; ``on_step`` after each local step.

        A client that raises an exception has failed; the others go on.
        """

    def close(self) -> None:
        """Ends what runs in the background; harmless when called twice."""


@dataclass
class InProcessHost(Generic[ExampleT, BatchT]):
    """One client after the other on one working copy.

    Args:
        task: what they train.
        pool: the candidate seeds.
        working: the model that they tune, where its parameters are; batches are moved there.
        seed, batch_size: of the order of each client's rows and its batches.
        storage: how clients visit both sides of the weights.
        max_loss_gap: a step with |L+ - L-| above it is skipped; 0 for no bound.
    """

    task: Task[ExampleT, BatchT]
    pool: SeedPool
    working: WorkingCopy
    seed: int
    batch_size: int
    storage: StorageChoice = DEFAULT_STORAGE
    max_loss_gap: float = 0.0

    def run(self, messages: Mapping[int, bytes], on_step: Callable[[], None]) -> dict[int, ClientRun]:
        """See `Host.run`."""
        return {client: self.run_client(client, message, on_step) for client, message in messages.items()}

    def run_client(self, client: int, message: bytes, on_step: Callable[[], None]) -> ClientRun:
        """One client's round."""
        reset = self.working.seconds_reset
        reply, local, error = None, None, None
        rows = self.task.datasets[client]
        try:
            party = Client(
                client,
                self.working,
                self.pool,
                loss=self.task.loss,
                batches=LocalBatches(
                    rows,
                    client,
                    self.seed,
                    self.batch_size,
                    self.task.collate,
                    input_device(self.working.model),
                    self.task.to_device,
                ),
                data_size=self.task.data_size(client),
                on_step=on_step,
                storage=self.storage,
                max_loss_gap=self.max_loss_gap or None,
            )
            round = Broadcast.from_bytes(message).round
            with seeded(self.working.model, self.seed % 2**64, round, client):
                reply = party.step(message)
            local = party.last_run
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return ClientRun(reply, local, error, self.working.seconds_reset - reset)

    def close(self) -> None:
        """Does nothing: nothing runs in the background."""
