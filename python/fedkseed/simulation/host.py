"""Clients that one machine hosts, and their rounds in this process.

`worker_pool` runs them in several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol

from fedkseed.federation.client import BatchT, LocalRun
from fedkseed.model.working_copy import WorkingCopy
from fedkseed.seeds import SeedPool
from fedkseed.simulation.batches import ExampleT
from fedkseed.simulation.config import SimulationConfig
from fedkseed.simulation.task import Task
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
        config: of the run.
        storage: how clients visit both sides of the weights.
    """

    task: Task[ExampleT, BatchT]
    pool: SeedPool
    working: WorkingCopy
    config: SimulationConfig
    storage: StorageChoice = DEFAULT_STORAGE

    def run(self, messages: Mapping[int, bytes], on_step: Callable[[], None]) -> dict[int, ClientRun]:
        """See `Host.run`."""
        return {client: self.run_client(client, message, on_step) for client, message in messages.items()}

    def run_client(self, client: int, message: bytes, on_step: Callable[[], None]) -> ClientRun:
        """One client's round."""
        reset = self.working.seconds_reset
        reply, local, error = None, None, None
        try:
            party = self.task.client(
                client, self.working, self.config, pool=self.pool, storage=self.storage, on_step=on_step
            )
            reply = party.step(message)
            local = party.last_run
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return ClientRun(reply, local, error, self.working.seconds_reset - reset)

    def close(self) -> None:
        """Does nothing: nothing runs in the background."""
