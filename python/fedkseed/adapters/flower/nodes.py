"""Which node is which client: asked once, told where several say the same."""

from __future__ import annotations

import logging
import time

from fedkseed._extras import require_extra
from fedkseed.adapters.flower.records import answers
from fedkseed.federation import TooFewRepliesError

require_extra("flower", "flwr")

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

logger = logging.getLogger("fedkseed")

#: Seconds that a node has for its number: who is silent is asked again in the next round.
_MOST_SECONDS = 120.0


class Nodes:
    """The nodes of a grid by the numbers of their clients.

    Args:
        num_clients: that are registered.
        timeout: seconds that nodes are waited for.

    Attributes:
        by_client: the node of each client that was there last.
    """

    def __init__(self, num_clients: int, timeout: float) -> None:
        self.by_client: dict[int, int] = {}
        self._num_clients, self._timeout = num_clients, timeout
        self._numbers: dict[int, int] = {}  # of the client, as each node says; -1: it cannot
        self._told: set[tuple[int, ...]] = set()  # numbers that several nodes state, with these nodes

    def reach(self, grid: Grid, enough: int) -> dict[int, int]:
        """The node of each client that is there, of so many at least; new nodes are asked who they are.

        Raises:
            TooFewRepliesError: fewer came in time.
        """
        end = time.monotonic() + self._timeout
        while True:
            there = set(grid.get_node_ids())
            new = sorted(there - self._numbers.keys())
            limit = min(self._timeout, _MOST_SECONDS)
            asked = {node: Message(RecordDict(), node, "query", ttl=limit) for node in new}
            replies = grid.send_and_receive(list(asked.values()), timeout=limit)
            for node, number in answers(asked, replies):
                self._numbers[node] = number if isinstance(number, int) else -1
            found = self._one_each(there)
            if len(found) >= enough:
                self.by_client = found
                return found
            if time.monotonic() > end:
                raise TooFewRepliesError(f"expected {enough} clients to be there, got {sorted(found)}")
            time.sleep(1.0)

    def _one_each(self, there: set[int]) -> dict[int, int]:
        """The node of each client, of these nodes.

        Where several state one number, the one that was the client before stays it, and none is where none
        was: they hold other data, and whose is meant the server cannot know.
        """
        claims: dict[int, list[int]] = {}
        for node, number in self._numbers.items():
            if node in there and number in range(self._num_clients):
                claims.setdefault(number, []).append(node)
        found = {}
        for number, nodes in claims.items():
            before = self.by_client.get(number)
            if len(nodes) == 1:
                found[number] = nodes[0]
            elif before in nodes:
                found[number] = before
            if len(nodes) > 1 and (claim := (number, *sorted(nodes))) not in self._told:
                self._told.add(claim)
                stays = f"node {found[number]} stays it" if number in found else "none of them takes part"
                logger.warning(
                    "expected one node as client %d, got nodes %s with that partition-id; %s: give each a "
                    "number of its own, or end all but one",
                    number,
                    ", ".join(map(str, sorted(nodes))),
                    stays,
                )
        return found
