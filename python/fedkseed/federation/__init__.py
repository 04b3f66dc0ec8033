"""The round between a server and its clients: messages as bytes, sums of replies, saved state."""

from __future__ import annotations

from fedkseed.federation.bounds import RECOMMENDED_BOUNDS, Bounds
from fedkseed.federation.client import Client, LocalRun
from fedkseed.federation.config import ServerConfig
from fedkseed.federation.messages import Broadcast, MessageError, ProtocolError, Reply
from fedkseed.federation.round import Round, TooFewRepliesError
from fedkseed.federation.server import Server
from fedkseed.federation.significance import SeedSignificance
from fedkseed.federation.state import StateError
from fedkseed.federation.summary import EvaluationSummary, RoundSummary

__all__ = [
    "RECOMMENDED_BOUNDS",
    "Bounds",
    "Broadcast",
    "Client",
    "EvaluationSummary",
    "LocalRun",
    "MessageError",
    "ProtocolError",
    "Reply",
    "Round",
    "RoundSummary",
    "SeedSignificance",
    "Server",
    "ServerConfig",
    "StateError",
    "TooFewRepliesError",
]
