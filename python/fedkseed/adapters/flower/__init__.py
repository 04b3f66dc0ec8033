"""Flower: apps of a server and of a client whose messages carry the federation's bytes; docs/flower.md."""

from __future__ import annotations

from fedkseed._extras import require_extra

require_extra("flower", "flwr")

from fedkseed.adapters.flower.client import client_app  # noqa: E402
from fedkseed.adapters.flower.server import FedKSeedStrategy, server_app  # noqa: E402

__all__ = ["FedKSeedStrategy", "client_app", "server_app"]
