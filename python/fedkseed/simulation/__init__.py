"""A federation on one machine: every client of every round, in this process or in workers."""

from __future__ import annotations

from fedkseed.simulation.config import SimulationConfig
from fedkseed.simulation.run_folder import RunFolderError
from fedkseed.simulation.simulation import RoundFailedError, RoundResult, Simulation
from fedkseed.simulation.task import Task
from fedkseed.simulation.worker_pool import WorkerError

__all__ = [
    "RoundFailedError",
    "RoundResult",
    "RunFolderError",
    "Simulation",
    "SimulationConfig",
    "Task",
    "WorkerError",
]
