"""Clients' scores of a round's model: what is sent, which answers have come, their means."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from fedkseed.federation.bounds import capped_weights
from fedkseed.federation.collecting import Collecting
from fedkseed.federation.evaluation_messages import EvaluationReply, evaluation_as_bytes
from fedkseed.federation.messages import MessageBytes, MessageError, ProtocolError
from fedkseed.federation.round_messages import RoundMessages
from fedkseed.federation.summary import EvaluationSummary
from fedkseed.federation.telling import tell_weights


class EvaluationRound(Collecting):
    """An evaluation of the model that a round starts from; made by `fedkseed.Server.open_evaluation`.

    It changes nothing of the server, and goes on being valid when the round is closed.

    Args:
        sent: who is asked, and with what.
        share_cap: an answer weighs at most this multiple of 1 / n among n answers, at least 1; 0 for no cap.

    Attributes:
        number: of the round that starts from this model.
        clients: who is asked, ascending.
    """

    def __init__(self, sent: RoundMessages, share_cap: float = 0.0) -> None:
        super().__init__(sent, "answers to the evaluation")
        self._share_cap = share_cap
        self._found: dict[int, EvaluationReply] = {}

    def add(self, client: int, reply: MessageBytes) -> None:
        """Takes the answer of one client; the very same bytes again count once.

        Every refusal is logged as a warning of the logger "fedkseed".

        Raises:
            MessageError: the answer is damaged, of another format, or no answer to an evaluation.
            ProtocolError: a client that is not asked, an answer to another message, or another one than was
                added before.
        """
        try:
            client = self._sent.require(client)
            try:
                raw = evaluation_as_bytes(reply)
                found = EvaluationReply.from_bytes(raw)
            except MessageError as error:
                raise self._unread(client, reply, error) from error
            wanted = (self.number, client, self._sent.digest(client))
            if (found.round, found.client, found.digest) != wanted:
                raise ProtocolError(
                    f"expected client {client} to answer this run's evaluation of round {self.number}, got "
                    "an answer to another message"
                )
            self._require_first(client, raw, self._replies.get(client))
        except (MessageError, ProtocolError) as error:
            self._tell_refusal(error)
            raise
        self._replies[client], self._found[client] = raw, found

    def close(self, min_replies: int = 1) -> EvaluationSummary:
        """The means of the scores, weighted by the clients' numbers of examples; more may be added after it.

        With ``share_cap`` no answer's weight is above that multiple of 1 / n, n the answers that have the
        score, and what is cut goes to the others: a client states its number of examples itself. A score is
        what the client says, however far from the others': ``by_client`` has them one by one. A weight that
        was cut, and one above all others together, are logged as warnings of the logger "fedkseed".

        Raises:
            TooFewRepliesError: fewer answers than ``min_replies``.
            TypeError, ValueError: ``min_replies`` is no count.
        """
        self._require_replies(min_replies)
        found = [self._found[client] for client in self.replied]
        names = sorted({name for reply in found for name in reply.scores})
        weights, capped = self._weights(found)
        summary = EvaluationSummary(
            round=self.number,
            clients=self.clients,
            replied=self.replied,
            missing=self.missing,
            num_examples=sum(reply.num_examples for reply in found),
            scores={name: self._mean(name, found) for name in names},
            by_client={reply.client: dict(reply.scores) for reply in found},
            weights={client: float(weight) for client, weight in weights.items()},
            capped=capped,
        )
        tell_weights(summary, self._share_cap)
        return summary

    def _mean(self, name: str, replies: list[EvaluationReply]) -> float:
        """The weighted mean of a score over the answers that have it, rounded once: in any order the same."""
        having = [reply for reply in replies if name in reply.scores]
        weights, _ = self._weights(having)
        # Exact numbers: floats could overflow under way, and leave the range of the scores.
        return float(
            sum((weights[reply.client] * Fraction(reply.scores[name]) for reply in having), Fraction())
        )

    def _weights(self, replies: list[EvaluationReply]) -> tuple[dict[int, Fraction], tuple[int, ...]]:
        """The weight of each answer, their sum exactly 1, and whose were cut."""
        if not replies:
            return {}, ()
        counts = np.array([reply.num_examples for reply in replies], dtype=np.float64)
        rounded, is_cut = capped_weights(counts, self._share_cap)
        # Those of no cap are the counts themselves, which are exact.
        shares = [Fraction(share) for share in (rounded if is_cut.any() else counts).tolist()]
        total = sum(shares)
        weights = {reply.client: share / total for reply, share in zip(replies, shares, strict=True)}
        return weights, tuple(
            reply.client for reply, cut in zip(replies, is_cut.tolist(), strict=True) if cut
        )
