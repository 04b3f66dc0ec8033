"""A federation over Flower in which client 1 hangs in the second round, until a test has killed its node."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from flwr.app import Context

from fedkseed import Broadcast
from fedkseed.adapters.flower import client_app, server_app
from support.flower_federation import make_client as make_good_client
from support.flower_federation import make_server


class Hanging:
    """A client that leaves a file and hangs."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def handle(self, message: bytes) -> bytes:
        peeked = Broadcast.peek(message)
        if (peeked.client, peeked.round) == (1, 1):
            Path(os.environ["FEDKSEED_TEST_FOLDER"], "hangs").touch()
            time.sleep(600)
        answer: bytes = self.client.handle(message)
        return answer


def make_client(context: Context) -> Any:
    return Hanging(make_good_client(context))


client = client_app(make_client)
server = server_app(make_server, min_nodes=2, timeout=120.0)
