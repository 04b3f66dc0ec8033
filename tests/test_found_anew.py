"""What a model gets after its optimizer was made is found: generators and modules that come later."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedkseed import ZOSGD, Inplace, Streamed
from fedkseed.storage import StorageOptions

MODES = [Inplace(), Inplace(chained=True), Streamed()]
X = torch.ones(4, 3, dtype=torch.float64)
#: Ways to draw a number below 1 from generators of each kind.
DRAWS: dict[type, Callable[[Any], float]] = {
    torch.Generator: lambda generator: torch.rand(1, generator=generator).item(),
    np.random.Generator: lambda generator: float(generator.random()),
    random.Random: lambda generator: float(generator.random()),
}


class Noisy(nn.Module):
    """Adds what its generators draw, where it has some."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1).double()
        self.generator: Any = None
        self.more: list[Any] = [torch.Generator()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = [self.generator, *self.more, getattr(self, "later", None)]
        drawn = sum(DRAWS[type(generator)](generator) for generator in held if generator is not None)
        return self.linear(x) + drawn


class Counting(nn.Module):
    """Adds the number of its calls in train mode, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return x + self.calls


def check_g_is_fair(optimizer: ZOSGD, model: nn.Module) -> None:
    """The g of a linear loss is of order 1; numbers or counts that differ give at least 1e3."""
    optimizer.step(lambda: model(X).sum())
    assert 0 < abs(optimizer.projected_grads[0]) < 50


CHANGES: dict[str, Callable[[Noisy], object]] = {
    "set where there was None": lambda model: setattr(model, "generator", np.random.default_rng(1)),
    "a new attribute": lambda model: setattr(model, "later", random.Random(1)),
    "exchanged in a list": lambda model: model.more.__setitem__(0, torch.Generator().manual_seed(2)),
    "one more in a list": lambda model: model.more.append(torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_generators_that_come_later_are_put_back(change: str, mode: StorageOptions) -> None:
    torch.manual_seed(0)
    model = Noisy()
    optimizer = ZOSGD(model, 0.0, 1e-6, storage=mode)
    check_g_is_fair(optimizer, model)
    for _ in range(2):
        CHANGES[change](model)
        check_g_is_fair(optimizer, model)


@pytest.mark.parametrize("mode", MODES)
def test_buffers_of_modules_that_come_later_are_put_back(mode: StorageOptions) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1).double())
    optimizer = ZOSGD(model, 0.0, 1e-6, storage=mode)
    model.append(Counting())
    check_g_is_fair(optimizer, model)


@pytest.mark.parametrize("mode", MODES)
def test_a_measurement_of_before_is_discarded_with_what_it_began_with(mode: StorageOptions) -> None:
    torch.manual_seed(0)
    model = Noisy()
    optimizer = ZOSGD(model, 0.0, 1e-6, storage=mode)
    state = model.more[0].get_state()
    optimizer.measure(lambda: model(X).sum())
    model.generator = torch.Generator()
    optimizer.measure(lambda: model(X).sum())
    optimizer.discard()
    assert torch.equal(model.more[0].get_state(), state)


@pytest.mark.parametrize("mode", MODES)
def test_buffers_of_a_module_in_the_place_of_another_are_put_back(mode: StorageOptions) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1).double(), Counting()).eval()
    optimizer = ZOSGD(model, 0.0, 1e-6, storage=mode)
    check_g_is_fair(optimizer, model)
    model[1] = Counting()
    check_g_is_fair(optimizer, model)
