"""FedKSeed: full-parameter tuning of language models across clients that exchange only seeds and scalars.

Qin et al., ICML 2024, arXiv 2312.06353. All noise and all passes over weights are `fedkseed_kernels`.
"""

from __future__ import annotations

from fedkseed.client import Client, LocalRun
from fedkseed.manifest import Manifest, manifest_parameters
from fedkseed.messages import Broadcast, MessageError, ProtocolError, Reply
from fedkseed.optim import ZOSGD, FedKSeedSGD
from fedkseed.seeds import SeedPool
from fedkseed.server import Server
from fedkseed.simulation import RoundResult, Simulation, SimulationConfig
from fedkseed.working_copy import WorkingCopy

__all__ = [
    "ZOSGD",
    "Broadcast",
    "Client",
    "FedKSeedSGD",
    "LocalRun",
    "Manifest",
    "MessageError",
    "ProtocolError",
    "Reply",
    "RoundResult",
    "SeedPool",
    "Server",
    "Simulation",
    "SimulationConfig",
    "WorkingCopy",
    "manifest_parameters",
]
