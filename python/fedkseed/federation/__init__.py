"""The round between a server and its clients: messages as bytes, sums of replies, saved state."""

from __future__ import annotations

from fedkseed.federation.client import Client, LocalRun
from fedkseed.federation.config import ServerConfig
from fedkseed.federation.messages import Broadcast, MessageError, ProtocolError, Reply
from fedkseed.federation.server import Server
from fedkseed.federation.significance import SeedSignificance
from fedkseed.federation.state import StateError

__all__ = [
    "Broadcast",
    "Client",
    "LocalRun",
    "MessageError",
    "ProtocolError",
    "Reply",
    "SeedSignificance",
    "Server",
    "ServerConfig",
    "StateError",
]
