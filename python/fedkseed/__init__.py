"""FedKSeed: full-parameter tuning of language models across clients that exchange only seeds and scalars.

Qin et al., ICML 2024, arXiv 2312.06353. All noise and all passes over weights are `fedkseed_kernels`.
"""

from __future__ import annotations

from fedkseed._extras import MissingExtraError
from fedkseed.federation import (
    RECOMMENDED_BOUNDS,
    Bounds,
    Broadcast,
    Client,
    ClientLimits,
    EvaluationReply,
    EvaluationRound,
    EvaluationSummary,
    LocalRun,
    MessageError,
    ProtocolError,
    Reply,
    Round,
    RoundSummary,
    SeedSignificance,
    Server,
    ServerConfig,
    StateError,
    TooFewRepliesError,
)
from fedkseed.files import FolderInUseError
from fedkseed.ledger import Ledger, LedgerError, SigningKeyError, load
from fedkseed.model import (
    IdentityError,
    Manifest,
    ModelIdentity,
    RoundModelFile,
    WorkingCopy,
    manifest_parameters,
)
from fedkseed.optim import ZOSGD, FedKSeedSGD, decay_groups, paired_losses
from fedkseed.seeds import SeedPool
from fedkseed.simulation import (
    RoundFailedError,
    RoundResult,
    RunFolderError,
    Simulation,
    SimulationConfig,
    Task,
    WorkerError,
)
from fedkseed.storage import Inplace, NotStreamableError, Streamed

__all__ = [
    "RECOMMENDED_BOUNDS",
    "ZOSGD",
    "Bounds",
    "Broadcast",
    "Client",
    "ClientLimits",
    "EvaluationReply",
    "EvaluationRound",
    "EvaluationSummary",
    "FedKSeedSGD",
    "FolderInUseError",
    "IdentityError",
    "Inplace",
    "Ledger",
    "LedgerError",
    "LocalRun",
    "Manifest",
    "MessageError",
    "MissingExtraError",
    "ModelIdentity",
    "NotStreamableError",
    "ProtocolError",
    "Reply",
    "Round",
    "RoundFailedError",
    "RoundModelFile",
    "RoundResult",
    "RoundSummary",
    "RunFolderError",
    "SeedPool",
    "SeedSignificance",
    "Server",
    "ServerConfig",
    "SigningKeyError",
    "Simulation",
    "SimulationConfig",
    "StateError",
    "Streamed",
    "Task",
    "TooFewRepliesError",
    "WorkerError",
    "WorkingCopy",
    "decay_groups",
    "load",
    "manifest_parameters",
    "paired_losses",
]
