"""Support for tests of storage="auto": a model that cannot be streamed, and its federation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedkseed import Task
from support.streamed_models import VOCABULARY, LanguageModel, build, loss_of


class ReadsHead(LanguageModel):
    """A weight read outside of its unit."""

    def forward(self, ids: Tensor) -> Tensor:
        return functional.linear(self.norm(self.layers[0](self.embed(ids))), self.head.weight)


class ReadsOutside(LanguageModel):
    """A weight read outside of its unit, after a buffer and random numbers have moved."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += torch.rand(1)
        hidden = self.norm(self.layers[0](self.embed(ids)))
        kept = torch.rand(hidden.shape) < 0.9
        return functional.linear(hidden * kept, self.head.weight) * (1 + self.calls / 8)


def make_ids_of_clients() -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (4, 5), generator=generator).tolist() for _ in range(4)]


def collate(rows: Sequence[list[int]]) -> Tensor:
    return torch.tensor(rows)


def make_task(kind: type[LanguageModel]) -> Task[Any, Any]:
    torch.manual_seed(7)
    return Task(build(kind, torch.bfloat16), make_ids_of_clients(), collate, loss_of)
