"""Support for tests of a client: a small model, its batches, a client and broadcasts to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

import fedkseed_kernels
from fedkseed import Broadcast, Client, ModelIdentity, SeedPool, WorkingCopy

POOL = SeedPool(21, 32)
RUN = b"one of many runs"
COEFFICIENTS = np.random.default_rng(1).normal(scale=0.01, size=32).astype(np.float32)


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 2).square().mean()


def batches(round: int, num_steps: int) -> Iterable[torch.Tensor]:
    generator = torch.Generator().manual_seed(round)
    return [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(num_steps)]


def make_client(working: WorkingCopy, **changes: Any) -> Client[torch.Tensor]:
    arguments: dict[str, Any] = {"loss": loss, "batches": batches, "data_size": 9}
    return Client(4, working, **{"pool": POOL, **arguments, **changes})


def make_broadcast(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "round": 2,
        "client": 4,
        "run_id": RUN,
        "identity": ModelIdentity.of(make_model()),
        "base_seed": 21,
        "lr": 0.05,
        "eps": 1e-3,
        "max_abs_g": 1e3,
        "coefficients": COEFFICIENTS,
        "schedule": np.array([3, 31, 3, 0], dtype=np.uint16),
    }
    return Broadcast(**{**fields, **changes}).to_bytes()


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same_bytes(left: Iterable[torch.Tensor], right: Iterable[torch.Tensor]) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True)
    )


def rebuilt(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The round's model of `make_broadcast`."""
    model = make_model(dtype)
    seeds = POOL.seeds.view(np.int64).tolist()
    with torch.no_grad():
        fedkseed_kernels.seed_axpy_(list(model.parameters()), seeds, COEFFICIENTS.tolist())
    return model
