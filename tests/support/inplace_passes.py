"""Support for tests of weights perturbed in place: the primitive's calls by hand, a walk that is watched."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import fedkseed_kernels
from fedkseed import ZOSGD
from fedkseed.storage import Inplace
from fedkseed_kernels.contract import derived
from support.small_model import make_closure, weights_of

EPS = float(np.float32(1e-2))
CHAINED = Inplace(chained=True)


class Passes:
    """The primitive's calls on a list of weights, pass after pass with the rounding seeds of an optimizer."""

    def __init__(self, weights: list[torch.Tensor], rounding: str, base_seed: int) -> None:
        self.weights = weights
        self._rounding = rounding
        self._seeds = iter(derived.seeds(base_seed, 3, np.arange(100)).tolist())

    def __call__(self, *terms: tuple[int, float], alpha: float = 1.0) -> list[torch.Tensor]:
        seed = next(self._seeds)
        options = {"rounding": self._rounding, "rounding_seed": seed} if self._rounding != "nearest" else {}
        seeds, coeffs = zip(*terms, strict=True)
        fedkseed_kernels.seed_axpy_(self.weights, seeds, coeffs, alpha=alpha, **options)
        return [weight.clone() for weight in self.weights]


def walked(optimizer: ZOSGD, model: nn.Module, num_steps: int) -> tuple[list[Any], list[tuple[float, ...]]]:
    """The weights at every evaluation, and g of every step."""
    seen, gradients = [], []
    closure = make_closure(model)

    def watched() -> torch.Tensor:
        seen.append(weights_of(model))
        return closure()

    for _ in range(num_steps):
        optimizer.step(watched)
        gradients.append(optimizer.projected_grads)
    return seen, gradients
