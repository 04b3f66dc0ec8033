"""The server: K sums and a round number. It never holds a client's weights, only seeds and scalars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedkseed._checks import check_count, check_eps, check_learning_rate
from fedkseed.manifest import Manifest
from fedkseed.messages import Broadcast, ProtocolError, Reply
from fedkseed.seeds import MAX_CLIENTS, MAX_ROUNDS, MAX_STEPS, SeedPool

Weighting = Literal["data_size", "equal"]


class Server:
    """Draws who takes part and with which seeds, and merges the scalars that come back.

    The state between rounds is ``round`` and ``coefficients``, O(K) whatever the number of clients; the model
    of a round is w0 + sum_k c_k z(seed_k) with c the coefficients rounded once to fp32, as they travel.

    A round's merge adds, for the replies in ascending order of client,

        a_j += -(lr weight) (sum of g over the client's steps that drew seed j, in step order)

    in fp64, where the weights are equal or proportional to the clients' data sizes and add up to 1 over the
    replies of the round. So the order of arrival does not matter.

    Args:
        manifest: of the model w0.
        pool: the candidate seeds; schedules and client samples derive from its base seed too.
        num_clients: registered clients, 0 .. num_clients - 1.
        clients_per_round: how many take part in a round.
        num_local_steps: tau, steps of a client in a round.
        lr: learning rate of the local steps.
        eps: scale of the perturbation, rounded to fp32.
        weighting: "data_size" or "equal".

    Attributes:
        round: number of the round that is open, from 0.
        clients: who takes part in it, ascending.
        coefficients: fp64 [K], the sums before they are rounded for the wire.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    def __init__(
        self,
        manifest: Manifest,
        pool: SeedPool,
        *,
        num_clients: int,
        clients_per_round: int,
        num_local_steps: int,
        lr: float,
        eps: float,
        weighting: Weighting = "data_size",
    ) -> None:
        self.manifest = manifest
        self.pool = pool
        self.num_clients = check_count("num_clients", num_clients, 1, MAX_CLIENTS)
        self.clients_per_round = check_count("clients_per_round", clients_per_round, 1, self.num_clients)
        self.num_local_steps = check_count("num_local_steps", num_local_steps, 1, MAX_STEPS - 1)
        self.lr = check_learning_rate(lr)
        self.eps = check_eps(eps)
        if weighting not in get_args(Weighting):
            raise ValueError(f"expected a weighting out of {list(get_args(Weighting))}, got {weighting!r}")
        self.weighting = weighting
        self.coefficients: NDArray[np.float64] = np.zeros(pool.num_seeds)
        self._open_round(0)

    @property
    def wire_coefficients(self) -> NDArray[np.float32]:
        """The sums rounded once to fp32: the round's model, fp32 [K]."""
        return self.coefficients.astype(np.float32)

    def schedule(self, client: int) -> NDArray[np.uint16]:
        """The indices into the pool that a client's steps of the open round use, uint16 [tau]."""
        return self.pool.schedule(self.round, client, self.num_local_steps)

    def broadcast(self, client: int) -> bytes:
        """The open round's message to one of its clients; the same bytes at every call.

        Raises:
            ProtocolError: the client does not take part in this round.
        """
        self._check_member(client)
        return Broadcast(
            round=self.round,
            client=client,
            base_seed=self.pool.base_seed,
            lr=self.lr,
            eps=self.eps,
            coefficients=self.wire_coefficients,
            schedule=self.schedule(client),
        ).to_bytes()

    def merge(self, replies: Iterable[tuple[int, bytes]]) -> None:
        """Adds the replies of the open round, (client, message) in any order, and opens the next round.

        Clients that did not reply are left out of the weights. Either all replies count or nothing changes.

        Raises:
            MessageError: a message is damaged.
            ProtocolError: no replies, two of one client, a client that does not take part, a reply of another
                round, client or number of steps, or sums beyond fp32.
        """
        opened: dict[int, Reply] = {}
        for client, message in replies:
            self._check_member(client)
            if client in opened:
                raise ProtocolError(f"expected one reply of client {client}, got two")
            opened[client] = self._check_reply(client, Reply.from_bytes(message))
        if not opened:
            raise ProtocolError(f"expected at least one reply of round {self.round}, got none")
        if self.round + 1 == MAX_ROUNDS:
            raise ProtocolError(f"expected at most {MAX_ROUNDS - 1} rounds, got one more")
        sums = self.coefficients.copy()
        shares = [
            opened[client].data_size if self.weighting == "data_size" else 1 for client in sorted(opened)
        ]
        for client, share in zip(sorted(opened), shares, strict=True):
            drawn, which = np.unique(self.schedule(client), return_inverse=True)
            # bincount adds one after the other, in fp64.
            gradients = np.bincount(which, weights=opened[client].scalars.astype(np.float64))
            sums[drawn] += -(self.lr * (share / sum(shares))) * gradients
        if not (np.abs(sums) <= np.finfo(np.float32).max).all():
            raise ProtocolError(
                "expected sums within fp32, got some beyond it; the learning rate is too large"
            )
        self.coefficients = sums
        self._open_round(self.round + 1)

    def _open_round(self, round: int) -> None:
        self.round = round
        self.clients = self.pool.sample_clients(round, self.num_clients, self.clients_per_round)

    def _check_member(self, client: int) -> None:
        if client not in self.clients:
            raise ProtocolError(
                f"expected one of the {self.clients_per_round} clients of round {self.round}, got {client}"
            )

    def _check_reply(self, client: int, reply: Reply) -> Reply:
        found = (reply.round, reply.client, len(reply.scalars))
        wanted = (self.round, client, self.num_local_steps)
        if found != wanted:
            raise ProtocolError(
                f"expected a reply of (round, client, number of steps) {wanted}, got one of {found}"
            )
        return reply
