"""Memory that a storage mode takes beside the stored weights, by the shapes of the model alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedkseed.storage.auto import StorageChoice, Tentative, check_choice, suited
from fedkseed.storage.interface import SIXTEEN_BIT, StorageOptions
from fedkseed.storage.streamed import Streamed
from fedkseed.storage.streamed.copies import Weight
from fedkseed.storage.streamed.forward import largest_needs
from fedkseed.storage.streamed.units import partition


@dataclass(frozen=True)
class Needs:
    """What a storage mode takes.

    Attributes:
        options: the mode; what "auto" is for the model.
        scratch: bytes for the perturbed copies of the largest unit, or of its halves.
        residuals: bytes of what compensated updates keep beside the weights.
        compute_dtype: of the forward passes of a step; None: that of the weights.
        num_halves: rows that stand in a forward pass for each of the batch, 2 if it is paired.
    """

    options: StorageOptions
    scratch: int
    residuals: int
    compute_dtype: torch.dtype | None
    num_halves: int


def needs(model: nn.Module, storage: StorageChoice, device: torch.device) -> Needs:
    """What a mode takes for a model's tuned parameters, which may be on the meta device.

    Args:
        storage: "auto" is resolved as for a ledger.
        device: where the model will be.

    Raises:
        TypeError: no storage mode.
    """
    check_choice(storage)
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if storage == "auto":
        is_short = any(parameter.dtype in SIXTEEN_BIT for parameter in tuned)
        storage = suited(is_short, device.type == "cpu", ledger_counts=True)
    options = storage.options if isinstance(storage, Tentative) else storage
    if not isinstance(options, Streamed):
        return Needs(options, 0, 0, None, 1)
    widened = options.compute_dtype
    weights = {}
    for name, parameter in model.named_parameters():
        widens = widened is not None and parameter.dtype in SIXTEEN_BIT
        if parameter.requires_grad or widens:
            dtype = widened if widened is not None and widens else parameter.dtype
            weights[id(parameter)] = Weight(name, parameter, parameter.data, None, dtype)
    units = partition(model, [weight.parameter for weight in weights.values()])
    largest = largest_needs(dict.fromkeys(units, device), weights)[device] if units else 0
    num_halves = 2 if options.paired else 1
    short = sum(parameter.numel() for parameter in tuned if parameter.dtype in SIXTEEN_BIT)
    residuals = 2 * short if options.compensated else 0
    return Needs(options, largest * num_halves, residuals, widened, num_halves)
