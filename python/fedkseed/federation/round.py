"""One open round: its clients, what they are sent, and what their replies add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.config import ServerConfig
from fedkseed.federation.messages import (
    Broadcast,
    BroadcastWriter,
    MessageError,
    ProtocolError,
    ReplyHeader,
    read_reply_header,
    read_scalars,
)
from fedkseed.federation.significance import SeedSignificance
from fedkseed.model.identity import ModelIdentity
from fedkseed.seeds import SeedPool

#: Scalars that are widened and added in one pass: bounds the memory beside the replies themselves.
_SCALARS_AT_ONCE = 1 << 18


class Round:
    """A round between its opening and its merge. Nothing here changes the server's sums.

    Schedules and messages are made when they are first needed.

    Args:
        number: of the round.
        identity: of the model w0.
        pool: the candidate seeds; schedules and the sample of clients derive from its base seed too.
        config: the federation's fixed numbers, with its run id.
        coefficients: fp32 [K], the round's model as it travels.
        significance: what FedKSeed-Pro draws the schedules from; None with uniform sampling. Not changed.

    Attributes:
        number: as given.
        clients: who is invited, ascending.
    """

    def __init__(
        self,
        number: int,
        identity: ModelIdentity,
        pool: SeedPool,
        config: ServerConfig,
        coefficients: NDArray[np.float32],
        significance: SeedSignificance | None,
    ) -> None:
        self.number = number
        self.clients = pool.sample_clients(number, config.num_clients, config.clients_per_round)
        self._rows = {client: row for row, client in enumerate(self.clients)}
        self._identity = identity
        self._pool = pool
        self._config = config
        self._coefficients = coefficients
        self._significance = significance
        self._made_schedules: NDArray[np.uint16] | None = None
        self._made_writer: BroadcastWriter | None = None

    def schedule(self, client: int) -> NDArray[np.uint16]:
        """See `fedkseed.Server.schedule`."""
        schedule: NDArray[np.uint16] = self._schedules()[self.row(client)]
        return schedule

    def message(self, client: int) -> bytes:
        """See `fedkseed.Server.broadcast`."""
        return self._writer().message(client, self.schedule(client))

    def row(self, client: int) -> int:
        """The client's place among those invited.

        Raises:
            ProtocolError: it is not invited.
        """
        row = self._rows.get(client)
        if row is None:
            raise ProtocolError(
                f"expected one of the {len(self.clients)} clients of round {self.number}, got {client!r}"
            )
        return row

    def read(self, client: int, message: bytes) -> ReplyHeader:
        """The header of a client's reply to this round's broadcast; its scalars are not looked at.

        Raises:
            MessageError, ProtocolError: as `fedkseed.Server.check`.
        """
        row = self.row(client)
        try:
            header = read_reply_header(message)
        except MessageError as error:
            raise MessageError(f"client {client}: {error}") from error
        found = (header.round, header.client, header.num_steps)
        wanted = (self.number, client, self._config.num_local_steps)
        if found != wanted:
            raise ProtocolError(
                f"expected a reply of (round, client, number of steps) {wanted}, got one of {found}"
            )
        if header.digest != self._writer().digest(client, self._schedules()[row]):
            raise ProtocolError(
                f"expected client {client} to answer this run's broadcast of round {self.number}, got an "
                "answer to another: of another run, model or configuration"
            )
        return header

    def check_scalars(self, clients: Sequence[int], scalars: NDArray[np.float32]) -> None:
        """Raises unless |g| is within the bound for all of [len(clients), tau]; a NaN is not.

        Raises:
            ProtocolError: names the first client and step.
        """
        bound = np.float32(self._config.max_abs_g)
        # A NaN stays NaN in both reductions, and then the comparison is false.
        if scalars.max() <= bound and scalars.min() >= -bound:
            return
        rows, steps = np.nonzero(~(np.abs(scalars) <= bound))
        raise ProtocolError(
            f"expected |g| of at most {bound} from client {clients[rows[0]]}, "
            f"got {scalars[rows[0], steps[0]]} at step {steps[0]}"
        )

    def add(self, replies: Mapping[int, bytes]) -> tuple[NDArray[np.float64], SeedSignificance | None]:
        """b of the formula in `fedkseed.Server`, fp64 [K], and the significance after the round.

        Args:
            replies: at least one, of clients of this round.

        Raises:
            MessageError, ProtocolError: as `fedkseed.Server.check`, for any of them.
        """
        clients = sorted(replies)
        sizes = [self.read(client, replies[client]).data_size for client in clients]
        sums = np.zeros(self._pool.num_seeds)
        significance = None if self._significance is None else self._significance.copy()
        shares = np.array(
            sizes if self._config.weighting == "data_size" else [1] * len(sizes), dtype=np.float64
        )
        weights = shares / shares.sum()
        rows = [self._rows[client] for client in clients]
        at_once = max(1, _SCALARS_AT_ONCE // self._config.num_local_steps)
        for start in range(0, len(clients), at_once):
            part = slice(start, start + at_once)
            scalars = read_scalars([replies[client] for client in clients[part]])
            self.check_scalars(clients[part], scalars)
            wide = scalars.astype(np.float64)
            indices = self._schedules()[rows[part]].reshape(-1).astype(np.intp)
            if significance is not None:
                significance.record_(indices, wide.reshape(-1))
            # One after the other, unlike a bincount of each part.
            np.add.at(sums, indices, (weights[part, None] * wide).reshape(-1))
        return sums, significance

    def _schedules(self) -> NDArray[np.uint16]:
        if self._made_schedules is None:
            probabilities = None if self._significance is None else self._significance.probabilities()
            steps = self._config.num_local_steps
            self._made_schedules = self._pool.schedules(self.number, self.clients, steps, probabilities)
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
