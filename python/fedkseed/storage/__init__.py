"""How a zeroth-order step visits both sides of the weights: options to choose from, one interface behind."""

from __future__ import annotations

from fedkseed.storage.inplace import Inplace
from fedkseed.storage.interface import (
    Direction,
    Evaluation,
    GroupUpdate,
    Storage,
    StorageOptions,
    TunedWeights,
)
from fedkseed.storage.modes import DEFAULT_STORAGE, STORAGE_MODES, storage_mode
from fedkseed.storage.streamed import Streamed

__all__ = [
    "DEFAULT_STORAGE",
    "STORAGE_MODES",
    "Direction",
    "Evaluation",
    "GroupUpdate",
    "Inplace",
    "Storage",
    "StorageOptions",
    "Streamed",
    "TunedWeights",
    "storage_mode",
]
