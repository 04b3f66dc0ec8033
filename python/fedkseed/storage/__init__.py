"""How a zeroth-order step visits both sides of the weights: options to choose from, one interface behind."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedkseed.storage.auto import DEFAULT_STORAGE, AutoStorage, StorageChoice, Tentative, check_choice
from fedkseed.storage.inplace import Inplace
from fedkseed.storage.interface import (
    SIXTEEN_BIT,
    Evaluation,
    GroupUpdate,
    Storage,
    StorageOptions,
    TunedWeights,
)
from fedkseed.storage.streamed import Streamed
from fedkseed.storage.streamed.refusals import NotStreamableError
from fedkseed.storage.texts import mode_of_text

__all__ = [
    "DEFAULT_STORAGE",
    "PAIRED_STORAGE_MODES",
    "SIXTEEN_BIT",
    "STORAGE_MODES",
    "AutoStorage",
    "Evaluation",
    "GroupUpdate",
    "Inplace",
    "NotStreamableError",
    "Storage",
    "StorageChoice",
    "StorageOptions",
    "Streamed",
    "Tentative",
    "TunedWeights",
    "check_choice",
    "mode_of_text",
    "storage_mode",
]

#: Modes by their names in flags and configuration files: those that a closure with one loss serves.
STORAGE_MODES: Mapping[str, StorageChoice] = {
    "auto": "auto",
    "inplace": Inplace(),
    "chained": Inplace(chained=True),
    "streamed": Streamed(),
    "streamed-fp32": Streamed(compute_dtype=torch.float32),
    "compensated": Streamed(compensated=True),
}

#: Those whose closure returns both losses of a doubled batch (`fedkseed.paired_losses`).
PAIRED_STORAGE_MODES: Mapping[str, StorageOptions] = {
    "paired": Streamed(paired=True),
    "paired-fp32": Streamed(paired=True, compute_dtype=torch.float32),
    "paired-compensated": Streamed(paired=True, compensated=True),
}


def storage_mode(name: str) -> StorageChoice:
    """The mode called ``name``.

    Raises:
        ValueError: there is none; says which there are.
    """
    modes = {**STORAGE_MODES, **PAIRED_STORAGE_MODES}
    if name not in modes:
        raise ValueError(f"expected a storage mode out of {list(modes)}, got {name!r}")
    return modes[name]
