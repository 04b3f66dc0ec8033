"""The app of a server and its strategy: rounds and evaluations over the nodes that are there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from fedkseed._checks import check_count
from fedkseed._extras import require_extra
from fedkseed.adapters.flower.nodes import Nodes
from fedkseed.adapters.flower.records import answers, content, metrics
from fedkseed.federation import (
    RECOMMENDED_BOUNDS,
    Bounds,
    EvaluationRound,
    EvaluationSummary,
    MessageError,
    ProtocolError,
    Round,
    RoundSummary,
    Server,
    TooFewRepliesError,
)
from fedkseed.federation.server import check_made_server

require_extra("flower", "flwr")

from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp, strategy

logger = logging.getLogger("fedkseed")


def server_app(make_server: Callable[[Context], Server], **options: Any) -> ServerApp:
    """The app of a server: rounds until "num-rounds" of the run config are complete in all.

    Then it saves the ledger as "ledger" of the run config.

    Args:
        make_server: a new one or one that was resumed.
        options: of `FedKSeedStrategy`.
    """

    def main(grid: Grid, context: Context) -> None:
        server = check_made_server(make_server(context))
        rounds = FedKSeedStrategy(server, **options)
        while (left := int(context.run_config["num-rounds"]) - server.round) > 0:
            rounds.start(grid, ArrayRecord(), left, rounds.timeout)
        server.ledger().save(str(context.run_config["ledger"]))

    app = ServerApp()
    app.main()(main)
    return app


class FedKSeedStrategy(strategy.Strategy):  # type: ignore[misc, unused-ignore]  # Any where Flower is not installed
    """A server's rounds, each over the nodes that are there; no weights travel, so arrays are left alone.

    Args:
        server: whose rounds they are.
        min_replies: of a round or evaluation; with fewer a round is tried again.
        max_lost: rounds in succession that are tried again; one more ends the run.
        min_nodes: clients that have to be there for the first round; for later ones ``min_replies``.
        num_evaluators: clients that evaluate the model after each round.
        timeout: seconds that a message and its answer may take, and that nodes are waited for.
        bounds: put in where the server's config has none; ``Bounds(0, 0)`` for none.
        on_round: called after each complete round, to save the server for instance.

    Raises:
        TypeError, ValueError: a number that is no count, more replies than a round invites, or more nodes
            than clients are registered.
    """

    def __init__(
        self,
        server: Server,
        *,
        min_replies: int = 1,
        max_lost: int = 3,
        min_nodes: int = 1,
        num_evaluators: int = 0,
        timeout: float = 3600.0,
        bounds: Bounds = RECOMMENDED_BOUNDS,
        on_round: Callable[[Server, RoundSummary], object] = lambda server, summary: None,
    ) -> None:
        server.put_bounds(bounds)
        self.server, self.timeout, self.on_round = server, timeout, on_round
        self.min_replies = server.config.check_min_replies(min_replies)
        # A node more than there are clients would be waited for in vain.
        self.min_nodes = max(check_count("min_nodes", min_nodes, 0, server.config.num_clients), min_replies)
        self.max_lost, self.num_evaluators = max_lost, num_evaluators
        self._num_lost = 0
        self._nodes = Nodes(server.config.num_clients, timeout)

    def summary(self) -> None:
        logger.info("from round %d on: %s", self.server.round, self.server.config)

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> list[Message]:
        found = self._nodes.reach(grid, self.min_replies if self._nodes.by_client else self.min_nodes)
        return self._messages(self.server.open(found), "train")

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[None, Any]:
        summary = self._summary(replies)
        self._num_lost = 0 if summary else self._num_lost + 1
        if self._num_lost > self.max_lost:
            raise TooFewRepliesError(f"expected {self.min_replies} replies, got fewer {self._num_lost} times")
        if isinstance(summary, RoundSummary):
            self.on_round(self.server, summary)
        return None, metrics(summary)

    def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> list[Message]:
        if not self.num_evaluators:
            return []
        return self._messages(
            self.server.open_evaluation(self._nodes.by_client, self.num_evaluators), "evaluate"
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return metrics(self._summary(replies)) if self.num_evaluators else None

    def _messages(self, asked: Round | EvaluationRound, kind: str) -> list[Message]:
        self._asked, self._sent = asked, {}
        for client, message in asked.messages.items():
            self._sent[client] = Message(
                content(message), self._nodes.by_client[client], kind, ttl=self.timeout
            )
        return list(self._sent.values())

    def _summary(self, replies: Iterable[Message]) -> RoundSummary | EvaluationSummary | None:
        """The summary of what was asked last; None if too few replied."""
        for client, reply in answers(self._sent, replies):
            if reply is not None:
                with suppress(MessageError, ProtocolError):  # which are logged there
                    self._asked.add(client, reply)
        try:
            return self._asked.close(min(self.min_replies, len(self._sent)))
        except TooFewRepliesError as error:
            logger.warning("%s", error)
            return None
