"""Models of which a forward pass moves more than activations: generators, buffers; each by its name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

WIDTH = 6


class Drawing(nn.Module):
    """Multiplies by a random number, of the generators that it owns or of the process's."""

    def __init__(self, draw: Callable[[Any], float], owned: Any = None) -> None:
        super().__init__()
        self.draw = draw
        self.owned = owned

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (0.5 + self.draw(self.owned))


class Scaled(nn.Module):
    """Multiplies by a running scale; a subclass says how it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        self.move(hidden)
        return hidden * self.scale

    def move(self, hidden: Tensor) -> None:
        self.scale.mul_(0.5).add_(hidden.detach().float().abs().mean(0).to(self.scale.dtype))


class Exchanged(Scaled):
    def move(self, hidden: Tensor) -> None:
        self.scale = self.scale * 0.5


class WrittenByData(Scaled):
    """A buffer written as codebooks of vector quantisation are: torch does not count this write."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, WIDTH))

    def move(self, hidden: Tensor) -> None:
        self.scale.data.mul_(0.5)


class ExchangedData(Scaled):
    def move(self, hidden: Tensor) -> None:
        self.scale.data = self.scale.data * 0.5


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, hidden: Tensor) -> Tensor:
        self.count += 1
        return hidden / self.count


class CountingByData(Counting):
    def forward(self, hidden: Tensor) -> Tensor:
        self.count.data += 1
        return hidden / self.count


class NoneAtFirst(Scaled):
    """What comes first decides: a normalisation that depends on data, made once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", None)

    def move(self, hidden: Tensor) -> None:
        if self.scale is None:
            self.scale = hidden.detach().abs().mean(0)


class Registering(Scaled):
    """The same, but the buffer is registered by the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        del self.scale

    def move(self, hidden: Tensor) -> None:
        if "scale" not in self._buffers:
            self.register_buffer("scale", hidden.detach().abs().mean(0))


class Sharing(nn.Module):
    """Two modules with one buffer, moved by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scaled(), Scaled()
        self.second.scale = self.first.scale

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(hidden))
        return found


class RunningStatistics(nn.Module):
    """Batch norm in train mode, and its running statistics beside."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, **options)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.norm(hidden)
        return found + self.norm.running_mean + self.norm.running_var


def _torch_draw(generator: Any) -> float:
    return float(torch.rand((), generator=generator))


def drawing() -> dict[str, Callable[[], nn.Module]]:
    """Modules that draw random numbers."""

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    return {
        "torch": lambda: Drawing(_torch_draw),
        "dropout": lambda: nn.Dropout(0.3),
        "torch.Generator": lambda: Drawing(_torch_draw, seeded(1)),
        "torch.Generator in a list": lambda: Drawing(lambda own: _torch_draw(own[1]), [seeded(1), seeded(2)]),
        "torch.Generator in a dict": lambda: Drawing(lambda own: _torch_draw(own["a"]), {"a": seeded(1)}),
        "NumPy": lambda: Drawing(lambda _: float(np.random.rand())),
        "NumPy, normal": lambda: Drawing(lambda _: float(np.random.randn())),
        "np.random.Generator": lambda: Drawing(lambda own: float(own.random()), np.random.default_rng(1)),
        "np.random.Generator in a tuple": lambda: Drawing(
            lambda own: float(own[0].random()), (np.random.Generator(np.random.Philox(1)),)
        ),
        "np.random.RandomState": lambda: Drawing(lambda own: float(own.randn()), np.random.RandomState(1)),
        "Python": lambda: Drawing(lambda _: random.random()),
        "random.Random": lambda: Drawing(lambda own: own.gauss(0, 1), random.Random(1)),
        "random.Random in a dict": lambda: Drawing(lambda own: own[0].random(), {0: random.Random(1)}),
    }


def moving() -> dict[str, Callable[[], nn.Module]]:
    """Modules that move buffers."""
    return {
        "batch norm": RunningStatistics,
        "batch norm without weights": lambda: RunningStatistics(affine=False),
        "batch norm, cumulative": lambda: RunningStatistics(momentum=None),
        "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
        "parametrizations.spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
        "in place": Scaled,
        "exchanged": Exchanged,
        "written by .data": WrittenByData,
        "exchanged .data": ExchangedData,
        "counter": Counting,
        "counter by .data": CountingByData,
        "None at first": NoneAtFirst,
        "registered in the forward": Registering,
        "shared": Sharing,
    }


class Block(nn.Module):
    """A linear layer and what is to be looked at behind it."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.moved = kind()

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.moved(torch.tanh(self.linear(hidden)))
        return found


@torch.no_grad()
def make_model(kind: Callable[[], nn.Module], dtype: torch.dtype, outside: bool = False) -> nn.Sequential:
    """In train mode; ``outside``: the module stands between blocks, not within one.

    Random weights, and equal ones for equal arguments.
    """
    torch.manual_seed(3)
    middle = [nn.Linear(WIDTH, WIDTH), kind()] if outside else [Block(kind)]
    return nn.Sequential(nn.Linear(5, WIDTH), *middle, nn.Linear(WIDTH, 3)).to(dtype)
