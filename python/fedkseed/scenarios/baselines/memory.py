"""The memory of a run, of FedKSeed or of another method, planned by shapes before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from fedkseed.scenarios.baselines.lora import ADAPTER_DTYPE, check_adaptable, num_adapter_weights
from fedkseed.scenarios.baselines.settings import FEDERATED, FIRST_ORDER
from fedkseed.scenarios.settings import RunSettings
from fedkseed.simulation.memory_plan import BatchShape, RunPlan, plan
from fedkseed.storage import Inplace
from fedkseed.storage.auto import suited
from fedkseed.storage.interface import SIXTEEN_BIT

#: What only FedKSeed holds: it rebuilds a model from w0.
_OF_FEDKSEED = ("w0", "the round's model")
#: Tensors of the size of what is tuned that an optimizer keeps.
_STATES = {"sgd": 0, "adam": 2, "adamw": 2}


def plan_run(
    model: nn.Module,
    settings: RunSettings,
    *,
    device: torch.device,
    train: Sequence[BatchShape],
    evaluations: Sequence[BatchShape],
    file_bytes: int,
) -> RunPlan:
    """What the run takes, and what is free now; arguments as those of `fedkseed.simulation.memory_plan.plan`.

    Raises:
        ModelError, MissingExtraError: as `check_adaptable`, of fedit.
    """
    if settings.baseline.method != "fedkseed":
        return plan_baseline(
            model, settings, device=device, train=train, evaluations=evaluations, file_bytes=file_bytes
        )
    return plan(
        model,
        settings.federation.storage,
        device=device,
        train=train,
        evaluations=evaluations,
        num_workers=settings.workers,
        file_bytes=file_bytes,
        autocast=settings.autocast == "bfloat16",
    )


def plan_baseline(
    model: nn.Module,
    settings: RunSettings,
    *,
    device: torch.device,
    train: Sequence[BatchShape],
    evaluations: Sequence[BatchShape],
    file_bytes: int,
) -> RunPlan:
    """The plan of a run of another method than FedKSeed; see `plan_run`."""
    baseline, storage = settings.baseline, settings.federation.storage
    is_first_order = baseline.method in FIRST_ORDER
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if is_first_order:
        storage = Inplace()
    elif storage == "auto":
        is_short = any(parameter.dtype in SIXTEEN_BIT for parameter in tuned)
        storage = suited(is_short, device.type == "cpu", ledger_counts=False)
    found = plan(
        model,
        storage,
        device=device,
        train=train,
        evaluations=evaluations,
        file_bytes=file_bytes,
        autocast=settings.autocast == "bfloat16",
    )
    size = sum(parameter.numel() * parameter.itemsize for parameter in tuned)
    added = {}
    if baseline.method == "fedit":
        check_adaptable(model)  # before anything is loaded
        size = num_adapter_weights(model, baseline.lora_rank) * ADAPTER_DTYPE.itemsize
        added["adapters"] = size
    if is_first_order:
        added["gradients"] = size
        added["the optimizer's state"] = size * _STATES[baseline.first_order_optimizer]
    places = []
    for place in found.places:
        parts = {name: part for name, part in place.parts.items() if name not in _OF_FEDKSEED}
        is_own = torch.device(place.place) == device
        places.append(dataclasses.replace(place, parts={**parts, **added} if is_own else parts))
    notes = list(found.notes)
    if is_first_order:
        notes.append("Not planned: what a backward pass keeps of the largest batch")
    if baseline.method in FEDERATED:
        # The broadcast, a reply of each client, the state, and the one that takes its place.
        on_disk = size * (3 + settings.federation.clients_per_round)
        notes.append(f"Files of a round on the disk: {on_disk / 1e9:.2f} GB")
    return RunPlan(places, notes)
