"""The app of a client: a message in, its answer out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from fedkseed._extras import require_extra
from fedkseed.adapters.flower.records import content, value
from fedkseed.federation import Client
from fedkseed.federation.client import check_made_client
from fedkseed.resident import connect

require_extra("flower", "flwr")

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

logger = logging.getLogger("fedkseed")


def client_app(make_client: Callable[[Context], Client[Any]], *, resident: bool | None = None) -> ClientApp:
    """The app of a client, which is the one of its node config's "partition-id".

    Of an error the server learns the type alone; the text is logged here.

    Args:
        make_client: of a node; at the top level of a module.
        resident: whether a process of its own holds the client between messages (`fedkseed.resident`); if
            None, where Flower starts a process for every message: everywhere but in its simulation.
    """
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        try:
            if message.metadata.message_type == "query":
                return Message(content(_number(context)), reply_to=message)
            make = partial(make_client, _plain(context))
            is_held = not _in_simulation() if resident is None else resident
            client = connect(make) if is_held else check_made_client(make())
            return Message(content(client.handle(value(message))), reply_to=message)
        except Exception as error:
            logger.exception("node %d could not answer", context.node_id)
            without_text = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__)
            return Message(without_text, reply_to=message)

    for register in (app.query, app.train, app.evaluate):
        register()(answer)
    return app


def _number(context: Context) -> int:
    """Which client a node is."""
    if "partition-id" not in context.node_config:
        raise ValueError(
            "expected the number of the node's client, got none; start flower-supernode with, for instance, "
            "--node-config 'partition-id=0'"
        )
    return int(context.node_config["partition-id"])


def _plain(context: Context) -> Context:
    """The context alone, its configs in order: with it a held client is found again from another process."""
    node_config, run_config = (
        dict(sorted(part.items())) for part in (context.node_config, context.run_config)
    )
    return Context(context.run_id, context.node_id, node_config, RecordDict(), run_config)


def _in_simulation() -> bool:
    """Whether this is an actor of Ray, which stays between messages."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
