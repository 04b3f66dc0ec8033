"""Flower: apps of a server and of a client whose messages carry the federation's bytes; docs/flower.md."""

from __future__ import annotations

from fedkseed.adapters.flower.client import client_app
from fedkseed.adapters.flower.server import FedKSeedStrategy, server_app

__all__ = ["FedKSeedStrategy", "client_app", "server_app"]
