"""FedKSeed: full-parameter tuning of language models across clients that exchange only seeds and scalars.

Qin et al., ICML 2024, arXiv 2312.06353. All noise and all passes over weights are `fedkseed_kernels`.
"""

from __future__ import annotations

from fedkseed.federation.client import Client, LocalRun
from fedkseed.federation.config import ServerConfig
from fedkseed.federation.messages import Broadcast, MessageError, ProtocolError, Reply
from fedkseed.federation.server import Server
from fedkseed.federation.significance import SeedSignificance
from fedkseed.federation.state import StateError
from fedkseed.ledger.format import LedgerError
from fedkseed.ledger.ledger import Ledger
from fedkseed.ledger.tuned_model import load
from fedkseed.model.identity import IdentityError, ModelIdentity
from fedkseed.model.manifest import Manifest, manifest_parameters
from fedkseed.model.working_copy import WorkingCopy
from fedkseed.optim.optimizers import ZOSGD, FedKSeedSGD
from fedkseed.optim.paired import paired_losses
from fedkseed.seeds import SeedPool
from fedkseed.simulation.simulation import RoundResult, Simulation, SimulationConfig
from fedkseed.simulation.task import Task
from fedkseed.storage import Inplace, Streamed

__all__ = [
    "ZOSGD",
    "Broadcast",
    "Client",
    "FedKSeedSGD",
    "IdentityError",
    "Inplace",
    "Ledger",
    "LedgerError",
    "LocalRun",
    "Manifest",
    "MessageError",
    "ModelIdentity",
    "ProtocolError",
    "Reply",
    "RoundResult",
    "SeedPool",
    "SeedSignificance",
    "Server",
    "ServerConfig",
    "Simulation",
    "SimulationConfig",
    "StateError",
    "Streamed",
    "Task",
    "WorkingCopy",
    "load",
    "manifest_parameters",
    "paired_losses",
]
