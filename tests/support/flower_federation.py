"""What a user of Flower writes, for the federation of `support.embedding`."""

from __future__ import annotations

from flwr.app import Context

from fedkseed import Client, Server
from fedkseed.adapters.flower import client_app, server_app
from support.embedding import CONFIG, SIZES, Batch, make_task


def make_client(context: Context) -> Client[Batch]:
    return make_task().client(int(context.node_config["partition-id"]), None, CONFIG)


def make_server(context: Context) -> Server:
    return make_task().server(CONFIG)


client = client_app(make_client)
server = server_app(make_server, min_nodes=len(SIZES), num_evaluators=2, timeout=120.0)
