"""Support for tests of the optimizers: a small model, its loss, and comparisons of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


def make_model(dtype: torch.dtype = torch.float64, seed: int = 3, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 1), nn.Dropout(dropout))
    return nn.Sequential(*layers).to(dtype)


def make_closure(model: nn.Module) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(12, 5, generator=generator, dtype=torch.float64).to(dtype)
    return lambda: (model(inputs).double() - 1).square().mean()


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same_bytes(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return all(
        torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
        for a, b in zip(left, right, strict=True)
    )


def largest_difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(left, right, strict=True))
