"""Where the adapters of peft began, as a published ledger tells it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from fedkseed.ledger.adapter_start import MARK, base_dtype, start_adapter
from fedkseed.ledger.origin import AdapterStart, OriginError
from fedkseed.model.manifest import manifest_parameters

logger = logging.getLogger("fedkseed")


def is_adapted(model: Any) -> bool:
    """Whether it is a model of peft."""
    return hasattr(model, "peft_config")


def base_of(model: Any) -> Any:
    """The model without peft's adapters."""
    return model.get_base_model() if is_adapted(model) else model


@torch.no_grad()
def start_of(model: Any, seed: int) -> AdapterStart:
    """How the adapters that the model holds began: by the rule of this seed, or by numbers of their own.

    `fedkseed.ledger.adapter_start.start_adapter` fills them by the rule, before a Trainer is made.

    Args:
        model: of peft, before its first step.
        seed: that the rule is tried with: the seed pool's.

    Raises:
        OriginError: weights of several dtypes beside the adapters.
    """
    matrices = [weight for name, weight in manifest_parameters(model) if MARK in name]
    kept = [weight.clone() for weight in matrices]
    try:
        start = start_adapter(model, seed)
    except OriginError:  # adapters that the rule does not make
        return AdapterStart(None, base_dtype(model))
    if all(torch.equal(weight, before) for weight, before in zip(matrices, kept, strict=True)):
        return start
    for weight, before in zip(matrices, kept, strict=True):
        weight.copy_(before)
    logger.info(
        "the numbers that the adapter began with are kept beside the ledger; call "
        "fedkseed.ledger.start_adapter(model, %d) before the Trainer is made, and a rule makes them",
        seed,
    )
    return AdapterStart(None, base_dtype(model))
