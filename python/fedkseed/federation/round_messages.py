"""What the server sends in one round: who is invited, their schedules, their broadcasts."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.config import ServerConfig
from fedkseed.federation.messages import Broadcast, BroadcastWriter, ProtocolError, broadcast_bytes
from fedkseed.federation.significance import SeedSignificance
from fedkseed.model.identity import ModelIdentity
from fedkseed.seeds import SeedPool


class RoundMessages(Mapping[int, bytes]):
    """The broadcasts of a round by client, ascending; the same bytes at every call.

    Schedules, and what all broadcasts share, are made when they are first needed.

    Args:
        number: of the round.
        clients: who is invited, ascending, at least one.
        identity: of the model w0.
        pool: the candidate seeds; schedules derive from its base seed too.
        config: the federation's fixed numbers, with its run id.
        coefficients: fp32 [K], the round's model as it travels.
        num_steps: of each schedule; 0: the messages ask for an evaluation.
        significance: what FedKSeed-Pro draws the schedules from; None with uniform sampling. Not changed.

    Attributes:
        number, clients: as given.
    """

    def __init__(
        self,
        number: int,
        clients: Sequence[int],
        identity: ModelIdentity,
        pool: SeedPool,
        config: ServerConfig,
        coefficients: NDArray[np.float32],
        num_steps: int,
        significance: SeedSignificance | None,
    ) -> None:
        self.number = number
        self.clients = tuple(clients)
        self._rows = {client: row for row, client in enumerate(self.clients)}
        self._identity = identity
        self._pool = pool
        self._config = config
        self._coefficients = coefficients
        self._num_steps = num_steps
        self._significance = significance
        self._made_schedules: NDArray[np.uint16] | None = None
        self._made_writer: BroadcastWriter | None = None

    def __getitem__(self, client: int) -> bytes:
        if client not in self._rows:
            raise KeyError(client)
        return self._writer().message(client, self.schedule(client))

    def __iter__(self) -> Iterator[int]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)

    def __contains__(self, client: object) -> bool:
        return client in self._rows

    def require(self, client: int) -> int:
        """The client as Python's integer, if it is invited.

        Raises:
            ProtocolError: it is not.
        """
        row = self._rows.get(client) if isinstance(client, numbers.Integral) else None
        if row is None:
            raise ProtocolError(
                f"expected one of the {len(self.clients)} clients of round {self.number}, "
                f"got {repr(client)[:99]}"
            )
        return self.clients[row]

    def schedule(self, client: int) -> NDArray[np.uint16]:
        """The indices into the pool of the steps of an invited client, uint16 [tau]."""
        schedule: NDArray[np.uint16] = self._schedules()[self._rows[client]]
        return schedule

    def schedules(self, clients: Sequence[int]) -> NDArray[np.uint16]:
        """`schedule` of several, [len(clients), tau]."""
        rows = [self._rows[client] for client in clients]
        schedules: NDArray[np.uint16] = self._schedules()[rows]
        return schedules

    def digest(self, client: int) -> bytes:
        """`broadcast_digest` of the message to an invited client, without making it."""
        return self._writer().digest(client, self.schedule(client))

    @property
    def num_bytes(self) -> int:
        """Bytes of all messages."""
        each = broadcast_bytes(self._pool.num_seeds, self._num_steps)
        return len(self.clients) * each

    def _schedules(self) -> NDArray[np.uint16]:
        if self._made_schedules is None:
            probabilities = None if self._significance is None else self._significance.probabilities()
            self._made_schedules = self._pool.schedules(
                self.number, self.clients, self._num_steps, probabilities
            )
        return self._made_schedules

    def _writer(self) -> BroadcastWriter:
        if self._made_writer is None:
            assert self._config.run_id is not None, "the server's constructor sets one"
            template = Broadcast(
                round=self.number,
                client=self.clients[0],
                run_id=self._config.run_id,
                identity=self._identity,
                base_seed=self._pool.base_seed,
                lr=self._config.lr,
                eps=self._config.eps,
                max_abs_g=self._config.max_abs_g,
                coefficients=self._coefficients,
                schedule=self._schedules()[0],
                family=self._config.family,
            )
            self._made_writer = BroadcastWriter(template)
        return self._made_writer
