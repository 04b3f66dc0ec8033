"""A row of the table: how to build a model of transformers, what it reads and what its loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn


def integers(low: int, high: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers from ``low`` to ``high`` - 1, equal for equal arguments."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def floats(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Normal fp64 numbers, equal for equal arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class ModelRow:
    """A model of transformers with a few thousand random weights, in eval mode.

    Attributes:
        name: of its class in transformers.
        options: of its configuration.
        make_inputs: what its forward is called with.
        output: of its forward's result what the loss is made of: the loss itself, or a tensor.
        refused: the parameter that streamed weights name when they refuse the model; None if they serve it.
        dtype: of weights, and of inputs that are no integers. Not fp64 where the model computes in fp32
            itself: mixtures of experts, whose product of groups has no fp64, masks as large as fp32 holds.
    """

    name: str
    options: Mapping[str, Any]
    make_inputs: Callable[[], dict[str, Any]]
    output: str = "loss"
    refused: str | None = None
    dtype: torch.dtype = torch.float64

    def make_model(self) -> Any:
        """The same weights each time; none (no bias, no norm's scale) is 0 or 1."""
        kind = getattr(transformers, self.name)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            model = kind(kind.config_class(**self.options)).double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        return model.to(self.dtype).eval()

    def make_batch(self) -> dict[str, Any]:
        return {
            name: value.to(self.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in self.make_inputs().items()
        }

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> float:
        """The loss, or the mean of an output's squares; random numbers are the same each time."""
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(19)
            result = getattr(model(**batch), self.output).double()
        return float(result if self.output == "loss" else result.square().mean())
