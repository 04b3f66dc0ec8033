"""The adapters of FedIT: low-rank matrices beside a decoder's projections, by the package peft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fedkseed._extras import require_extra
from fedkseed.data.architectures import ModelError
from fedkseed.model.randomness import seeded
from fedkseed.scenarios.baselines.settings import BaselineSettings

#: The last part of the names of the matrices that get an adapter: attention's, and the gated perceptron's.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Of the adapters, whatever the model's: 16 bits would lose their small updates.
ADAPTER_DTYPE = torch.float32


class Adapters(NamedTuple):
    """What was put into a model.

    Attributes:
        parameters: the low-rank matrices by name, the only ones that ask for a gradient.
        dropouts: the modules of their dropout.
    """

    parameters: Mapping[str, nn.Parameter]
    dropouts: Sequence[nn.Module]


def check_adaptable(model: nn.Module) -> None:
    """Raises unless adapters can be put into the model; its shapes are enough.

    Raises:
        ModelError: a model without one of the seven projections.
        MissingExtraError: peft is not installed.
    """
    _projections(model)
    require_extra("scenarios", "peft")


def num_adapter_weights(model: nn.Module, rank: int) -> int:
    """How many numbers the adapters have, told by the model's shapes.

    Raises:
        ModelError: a model without one of the seven projections.
    """
    return sum(rank * (linear.in_features + linear.out_features) for linear in _projections(model))


def add_adapters(model: nn.Module, settings: BaselineSettings, seed: int) -> Adapters:
    """Puts adapters into the model, which computes as before: one of both matrices begins as zeros.

    The model's own parameters are frozen, and its calling convention stays.

    Args:
        model: changed in place.
        settings: rank, alpha and dropout are taken.
        seed: of the other matrix.

    Raises:
        ModelError: a model without one of the seven projections.
        MissingExtraError: peft is not installed.
    """
    _projections(model)
    require_extra("scenarios", "peft")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # a factor; whole numbers are usual
        lora_dropout=settings.lora_dropout,
        target_modules=list(PROJECTIONS),
    )
    own = {id(parameter) for parameter in model.parameters()}
    with seeded(model, seed % 2**64):
        inject_adapter_in_model(config, model)
    added = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) not in own)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(ADAPTER_DTYPE)
            added[name] = parameter
    dropouts = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name
    ]
    model.eval()
    return Adapters(added, dropouts)


def _projections(model: nn.Module) -> list[nn.Linear]:
    found = dict(_linears(model))
    names = {name.rpartition(".")[2] for name in found}
    if missing := [name for name in PROJECTIONS if name not in names]:
        raise ModelError(
            f"expected a model with linear layers named {', '.join(PROJECTIONS)} for fedit, got none named "
            f"{', '.join(missing)} in {type(model).__name__}; take a decoder that has them, as Llama's, "
            "or another method"
        )
    return list(found.values())


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS:
            yield name, module
