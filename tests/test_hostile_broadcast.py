"""A broadcast that is well formed and ruins a round: nothing of it is left in the next one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.small_client import batches, make_broadcast
from torch import nn

from fedkseed import Client, Inplace, ModelIdentity, Reply, SeedPool, Streamed, WorkingCopy
from fedkseed.storage import StorageOptions


class Carried(nn.Module):
    """Keeps a mean of what it has seen in a buffer that no state dict has, and draws from a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * values.detach().mean(0)  # another tensor each time
        return values + self.mean + torch.rand(8, generator=self.generator, dtype=values.dtype)


def make_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), Carried(), nn.Tanh(), nn.Linear(8, 1))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Finite whatever the model says, so that the step of a ruined model counts and leaves its buffers."""
    return torch.nan_to_num((model(batch) - 2).square().mean(), nan=1.0, posinf=1.0)


def scores(model: nn.Module, round: int) -> dict[str, float]:
    """In train mode, as somebody may forget: the statistics move."""
    return {"loss": loss(model, batches(round, 1)[0].float()).item()}


HOSTILE = {
    "step": {"coefficients": np.full(32, 3e38, np.float32)},
    "step of a large lr": {"lr": 1e34},
    "evaluate": {"coefficients": np.full(32, 3e38, np.float32), "schedule": np.zeros(0, np.uint16)},
}


@pytest.mark.parametrize("storage", [Inplace(), Inplace(chained=True), Streamed()], ids=repr)
@pytest.mark.parametrize("round_model", [None, "own"])
@pytest.mark.parametrize("changes", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.filterwarnings("ignore:both sides of the weights had equal losses")
def test_the_next_honest_broadcast_gives_the_bytes_of_before(
    storage: StorageOptions, round_model: Any, changes: dict[str, Any]
) -> None:
    """Coefficients of 3e38 overflow the model in fp32 and leave NaN in the statistics of batch norm."""
    model = make_model()
    client = Client(
        4,
        WorkingCopy(model, round_model=round_model),
        SeedPool(21, 32),
        loss=loss,
        batches=lambda round, num_steps: [batch.float() for batch in batches(round, num_steps)],
        data_size=9,
        storage=storage,
        evaluate=scores,
    )
    identity = ModelIdentity.of(model)
    fresh = {name: buffer.clone() for name, buffer in model.named_buffers()}
    honest = make_broadcast(identity=identity)
    first = client.step(honest)
    assert (Reply.from_bytes(first).scalars != 0).all()
    client.handle(make_broadcast(identity=identity, **changes))
    ruined = dict(model.named_buffers())
    assert ruined["1.running_var"].isfinite().sum() == 0
    assert client.step(honest) == first
    client.load(honest)
    now = dict(model.named_buffers())
    assert all(torch.equal(buffer, now[name]) for name, buffer in fresh.items())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
