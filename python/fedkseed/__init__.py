"""FedKSeed: full-parameter tuning of language models across clients that exchange only seeds and scalars.

Qin et al., ICML 2024, arXiv 2312.06353. All noise and all passes over weights are `fedkseed_kernels`.
"""

from __future__ import annotations

from fedkseed.client import Client, LocalRun
from fedkseed.hosting import Task
from fedkseed.ledger.format import LedgerError
from fedkseed.ledger.ledger import Ledger
from fedkseed.ledger.tuned_model import load
from fedkseed.model.identity import IdentityError, ModelIdentity
from fedkseed.model.manifest import Manifest, manifest_parameters
from fedkseed.model.working_copy import WorkingCopy
from fedkseed.optim.optimizers import ZOSGD, FedKSeedSGD
from fedkseed.optim.paired import paired_losses
from fedkseed.pro import SeedSignificance
from fedkseed.protocol import Broadcast, MessageError, ProtocolError, Reply
from fedkseed.seeds import SeedPool
from fedkseed.server import Server
from fedkseed.server_config import ServerConfig
from fedkseed.server_state import StateError
from fedkseed.simulation import RoundResult, Simulation, SimulationConfig
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
