"""One open round as an object: what is sent, which replies have come, what they came to.

An adapter is transport around it:

    round = server.open()
    for client, message in round.messages.items(): ...  # send
    round.add(client, reply)                            # as they come, in any order
    summary = round.close(min_replies=...)              # the server is in the next round
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.collecting import Collecting
from fedkseed.federation.config import ServerConfig
from fedkseed.federation.messages import (
    MessageBytes,
    MessageError,
    ProtocolError,
    ReplyHeader,
    read_reply_header,
    reply_as_bytes,
    scalars_in_parts,
)
from fedkseed.federation.round_messages import RoundMessages
from fedkseed.federation.summary import RoundSummary


class Round(Collecting):
    """A round between its opening and its merge; made by `fedkseed.Server.open`.

    Nothing here changes the server's sums but `close`. No method changes anything when it raises.

    Args:
        sent: who is invited, and with what.
        config: the federation's fixed numbers.
        is_open: whether the server's open round is one of these messages.
        close: merges a round; the server's part of `close`.

    Attributes:
        number: of the round, from 0.
        clients: who is invited, ascending.
        messages: the broadcast to each client, made when it is asked for.
        replied, missing: whose reply was added, and whose was not, ascending.
    """

    def __init__(
        self,
        sent: RoundMessages,
        config: ServerConfig,
        is_open: Callable[[RoundMessages], bool],
        close: Callable[[Round], RoundSummary],
    ) -> None:
        super().__init__(sent, "replies")
        self._config = config
        self._is_open = is_open
        self._close = close
        self._sizes: dict[int, int] = {}

    @property
    def sizes(self) -> Mapping[int, int]:
        """The data sizes that the replies state, by client."""
        return dict(self._sizes)

    def schedules(self, clients: Sequence[int]) -> NDArray[np.uint16]:
        """`schedule` of several, [len(clients), tau]."""
        return self._sent.schedules(clients)

    def schedule(self, client: int) -> NDArray[np.uint16]:
        """See `fedkseed.Server.schedule`."""
        return self._sent.schedule(self._sent.require(client))

    def add(self, client: int, reply: MessageBytes) -> None:
        """Takes the reply of one client; the very same bytes again count once.

        Every refusal is logged as a warning of the logger "fedkseed".

        Raises:
            MessageError, ProtocolError: as `check`; another reply of this client than the one added before;
                a round that is over.
        """
        self.add_all([(client, reply)])

    def add_all(self, replies: Iterable[tuple[int, MessageBytes]]) -> None:
        """Several replies as `add` takes them, (client, reply) in any order; all or, where it raises, none.

        Raises:
            MessageError, ProtocolError: as `add`.
        """
        taken: dict[int, bytes] = {}
        sizes: dict[int, int] = {}
        try:
            self._require_open()
            for given, reply in replies:
                client = self._sent.require(given)
                raw, header = self._read(client, reply)
                self._require_first(client, raw, taken.get(client, self._replies.get(client)))
                taken[client], sizes[client] = raw, header.data_size
            if taken:
                self._check_scalars(taken)
        except (MessageError, ProtocolError) as error:
            self._tell_refusal(error)
            raise
        self._replies.update(taken)
        self._sizes.update(sizes)

    def check(self, client: int, reply: MessageBytes) -> bytes:
        """The reply as bytes, if `add` would take it as the client's first; a refusal is logged as there.

        Raises:
            MessageError: the message is damaged, of another format or contract version, or not a reply.
            ProtocolError: a client that is not invited; a reply of another round, client or number of steps,
                or to another broadcast; a scalar that is NaN, infinite or beyond the bound.
        """
        try:
            client = self._sent.require(client)
            raw, _ = self._read(client, reply)
            self._check_scalars({client: raw})
        except (MessageError, ProtocolError) as error:
            self._tell_refusal(error)
            raise
        return raw

    def close(self, min_replies: int = 1) -> RoundSummary:
        """Merges the replies that were added and opens the server's next round; this one is over.

        Those that are missing leave their weight to the others. Without any reply, which ``min_replies=0``
        allows, the model stays as it is and the next round invites others.

        Raises:
            TooFewRepliesError: fewer replies than ``min_replies``; the round stays open and takes more.
            ProtocolError: sums beyond fp32, no further round has a number, or a round that is over.
            TypeError, ValueError: ``min_replies`` is no count.
        """
        self._require_open()
        self._require_replies(min_replies)
        return self._close(self)

    def anew(self) -> Round:
        """This round with the same messages and no replies; over as soon as a round of them is merged."""
        return Round(self._sent, self._config, self._is_open, self._close)

    def _require_open(self) -> None:
        if not self._is_open(self._sent):
            raise ProtocolError(
                f"expected the round that is open, got round {self.number}, which is over; server.open() "
                "gives the one that is"
            )

    def _read(self, client: int, reply: MessageBytes) -> tuple[bytes, ReplyHeader]:
        """An invited client's reply to its broadcast and its header; its scalars are not looked at."""
        try:
            raw = reply_as_bytes(reply)
            header = read_reply_header(raw)
        except MessageError as error:
            raise self._unread(client, reply, error) from error
        found = (header.round, header.client, header.num_steps)
        wanted = (self.number, client, self._config.num_local_steps)
        if found != wanted:
            raise ProtocolError(
                f"expected a reply of (round, client, number of steps) {wanted}, got one of {found}"
            )
        if header.digest != self._sent.digest(client):
            raise ProtocolError(
                f"expected client {client} to answer this run's broadcast of round {self.number}, got an "
                "answer to another: of another run, model or configuration"
            )
        return raw, header

    def _check_scalars(self, replies: Mapping[int, bytes]) -> None:
        """Raises unless |g| is within the bound everywhere; a NaN is not."""
        clients = sorted(replies)
        bound = np.float32(self._config.max_abs_g)
        raw = [replies[client] for client in clients]
        for part, scalars in scalars_in_parts(raw, self._config.num_local_steps):
            # A NaN stays NaN in both reductions, and then the comparison is false.
            if scalars.max() <= bound and scalars.min() >= -bound:
                continue
            rows, steps = np.nonzero(~(np.abs(scalars) <= bound))
            raise ProtocolError(
                f"expected |g| of at most {bound} from client {clients[part][rows[0]]}, "
                f"got {scalars[rows[0], steps[0]]} at step {steps[0]}"
            )
