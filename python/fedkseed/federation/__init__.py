"""The round between a server and its clients: messages as bytes, sums of replies, saved state."""

from __future__ import annotations

from fedkseed.federation.bounds import RECOMMENDED_BOUNDS, Bounds
from fedkseed.federation.client import Client, LocalRun
from fedkseed.federation.collecting import TooFewRepliesError
from fedkseed.federation.config import ServerConfig
from fedkseed.federation.evaluation_messages import EvaluationReply
from fedkseed.federation.evaluation_round import EvaluationRound
from fedkseed.federation.limits import ClientLimits
from fedkseed.federation.messages import Broadcast, MessageError, ProtocolError, Reply
from fedkseed.federation.round import Round
from fedkseed.federation.server import Server
from fedkseed.federation.significance import SeedSignificance
from fedkseed.federation.state import StateError
from fedkseed.federation.summary import EvaluationSummary, RoundSummary

__all__ = [
    "RECOMMENDED_BOUNDS",
    "Bounds",
    "Broadcast",
    "Client",
    "ClientLimits",
    "EvaluationReply",
    "EvaluationRound",
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
