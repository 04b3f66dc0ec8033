"""What a round of training and one of evaluation have in common: messages out, answers in, who is missing."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fedkseed._checks import check_count
from fedkseed.federation.messages import MessageError, ProtocolError
from fedkseed.federation.round_messages import RoundMessages
from fedkseed.seeds import MAX_CLIENTS

logger = logging.getLogger("fedkseed")

#: Clients that a line of text names.
_MOST_NAMED = 8


class TooFewRepliesError(ProtocolError):
    """A round that is to be closed with fewer replies than asked for; it stays open and takes more."""


class Collecting:
    """Messages that went out, and the answers to them that have come; for one thread at a time.

    Args:
        sent: who is asked, and with what.
        what: the answers are called that in errors.

    Attributes:
        number: of the round whose model the messages carry, from 0.
        clients: who is asked, ascending.
    """

    def __init__(self, sent: RoundMessages, what: str) -> None:
        self.number = sent.number
        self.clients = sent.clients
        self._sent = sent
        self._what = what
        self._replies: dict[int, bytes] = {}

    @property
    def messages(self) -> Mapping[int, bytes]:
        """The message to each client, ascending; made when asked for, the same bytes at every call."""
        return self._sent

    @property
    def replies(self) -> Mapping[int, bytes]:
        """The answers that were added, by client."""
        return dict(self._replies)

    @property
    def replied(self) -> tuple[int, ...]:
        """Whose answer was added, ascending."""
        return tuple(sorted(self._replies))

    @property
    def missing(self) -> tuple[int, ...]:
        """Whose answer was not, ascending."""
        return tuple(client for client in self.clients if client not in self._replies)

    @property
    def num_bytes_down(self) -> int:
        """Bytes of all messages."""
        return self._sent.num_bytes

    def message(self, client: int) -> bytes:
        """The message to one client.

        Raises:
            ProtocolError: it is not asked.
        """
        return self._sent[self._sent.require(client)]

    def _require_first(self, client: int, reply: bytes, known: bytes | None) -> None:
        if known is not None and known != reply:
            raise ProtocolError(
                f"expected one reply of client {client}, got two that differ; the first one counts"
            )

    def _require_replies(self, min_replies: int) -> None:
        check_count("min_replies", min_replies, 0, MAX_CLIENTS)
        if len(self._replies) < min_replies:
            what = f"missing are clients {some(self.missing)}: add more"
            if min_replies > len(self.clients):
                what = "no more were asked, and none that is to come makes it enough: ask more clients"
            raise TooFewRepliesError(
                f"expected at least {min_replies} {self._what} of round {self.number}, got "
                f"{len(self._replies)} of {len(self.clients)}; {what}, or close with a smaller min_replies"
            )

    def _unread(self, client: int, reply: object, error: MessageError) -> MessageError:
        """The error of a client's answer that is none; a pipe whose other side ended gives no byte."""
        is_empty = isinstance(reply, (bytes, bytearray, memoryview)) and reply == b""
        ended = ": the client ended before it answered, or closed its connection; look at its own output"
        return MessageError(f"client {client}: {error}{ended if is_empty else ''}")

    def _tell_refusal(self, error: Exception) -> None:
        logger.warning("round %d: a reply was refused: %s", self.number, error)


def some(clients: tuple[int, ...]) -> str:
    """Numbers of clients for a line of text, the first few of many."""
    named = ", ".join(map(str, clients[:_MOST_NAMED]))
    return named if len(clients) <= _MOST_NAMED else f"{named} and {len(clients) - _MOST_NAMED} others"
