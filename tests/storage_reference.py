"""What a step does to a model in each storage mode: the contract's passes over an explicit copy of it.

Streams are counted here by `named_parameters`. A class below is one storage mode: ``losses`` measures both
sides, ``update`` ends the step, ``restore`` is what follows a closure that raises.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedkseed_kernels import _exact, reference

Evaluate = Callable[[nn.Module], float]
Shapes = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=256)
def noise(shapes: Shapes, seed: int) -> NDArray[np.float32]:
    """z of tensors of these shapes with the streams 0, 1, 2, ..., one behind the other."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    return np.concatenate([reference.gaussian(seed, i, np.arange(size)) for i, size in enumerate(sizes)])


def pass_over(model: nn.Module, seeds: Sequence[int], coeffs: Sequence[float], alpha: float = 1.0) -> None:
    """The primitive (contract, section 6.1) in place over all parameters, tied ones once; of one dtype."""
    parameters = [parameter.detach() for _, parameter in model.named_parameters()]
    shapes = tuple(tuple(parameter.shape) for parameter in parameters)
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    fma, number = (_exact.fma64, np.float64) if flat.dtype == torch.float64 else (_exact.fma32, np.float32)
    acc = number(-0.0)
    for seed, coefficient in zip(seeds, coeffs, strict=True):
        if coefficient:
            acc = fma(number(coefficient), noise(shapes, seed), acc)
    stored: Any = flat.float() if flat.dtype == torch.bfloat16 else flat
    y = fma(number(np.float32(alpha)), stored.numpy(), acc)
    if flat.dtype == torch.bfloat16:
        moved = torch.from_numpy(reference.round_to_nearest(y, "bfloat16").view(np.int16)).view(
            torch.bfloat16
        )
    else:
        moved = torch.from_numpy(y)
    pieces = moved.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view(parameter.shape))


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    """Whether every stored byte agrees."""
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(
        name == other_name and torch.equal(_bytes(parameter), _bytes(other_parameter))
        for (name, parameter), (other_name, other_parameter) in pairs
    )


def _bytes(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().contiguous().view(torch.uint8)


class InplaceReference:
    """w + eps z; minus 2 eps z; restore and update in one pass, (alpha eps - lr g) z."""

    def __init__(self, model: nn.Module, eps: float, lr: float, alpha: float) -> None:
        self.model = copy.deepcopy(model)
        self.eps, self.lr, self.alpha = eps, lr, alpha

    def losses(self, seed: int, evaluate: Evaluate) -> tuple[float, float]:
        pass_over(self.model, [seed], [self.eps])
        plus = evaluate(self.model)
        pass_over(self.model, [seed], [-2 * self.eps])
        return plus, evaluate(self.model)

    def update(self, seed: int, g: float, next_seed: int) -> None:
        pass_over(self.model, [seed], [self.alpha * self.eps - self.lr * g], self.alpha)

    def flush(self) -> None:
        """Nothing waits."""

    def restore(self, seed: int, num_evaluations: int) -> None:
        """After a closure that raised when it was called for the ``num_evaluations``-th time."""
        pass_over(self.model, [seed], [self.eps])
        if num_evaluations == 2:
            pass_over(self.model, [seed], [-2 * self.eps])
        pass_over(self.model, [seed], [-self.eps if num_evaluations == 1 else self.eps])


class ChainedReference(InplaceReference):
    """In place, but the update's pass goes on to w + eps z of the step to come."""

    def __init__(self, model: nn.Module, eps: float, lr: float, alpha: float) -> None:
        super().__init__(model, eps, lr, alpha)
        self.waiting: int | None = None

    def losses(self, seed: int, evaluate: Evaluate) -> tuple[float, float]:
        if self.waiting is None:
            return super().losses(seed, evaluate)
        assert self.waiting == seed
        self.waiting = None
        plus = evaluate(self.model)
        pass_over(self.model, [seed], [-2 * self.eps])
        return plus, evaluate(self.model)

    def update(self, seed: int, g: float, next_seed: int) -> None:
        coeffs = [self.alpha * self.eps - self.lr * g, self.eps]
        pass_over(self.model, [seed, next_seed], coeffs, self.alpha)
        self.waiting = next_seed

    def flush(self) -> None:
        if self.waiting is not None:
            pass_over(self.model, [self.waiting], [-self.eps])
            self.waiting = None

    def restore(self, seed: int, num_evaluations: int) -> None:
        if self.waiting is None:
            super().restore(seed, num_evaluations)
            return
        assert self.waiting == seed
        self.waiting = None
        if num_evaluations == 2:
            pass_over(self.model, [seed], [-2 * self.eps])
        pass_over(self.model, [seed], [-self.eps if num_evaluations == 1 else self.eps])


class StreamedReference:
    """Both sides are copies made from the weights, which only the update changes: -lr g z."""

    def __init__(self, model: nn.Module, eps: float, lr: float, alpha: float) -> None:
        self.model = copy.deepcopy(model)
        self.eps, self.lr, self.alpha = eps, lr, alpha

    def losses(self, seed: int, evaluate: Evaluate) -> tuple[float, float]:
        return self._side(seed, self.eps, evaluate), self._side(seed, -self.eps, evaluate)

    def update(self, seed: int, g: float, next_seed: int) -> None:
        pass_over(self.model, [seed], [-self.lr * g], self.alpha)

    def flush(self) -> None:
        """Nothing waits."""

    def restore(self, seed: int, num_evaluations: int) -> None:
        """Nothing was changed."""

    def _side(self, seed: int, offset: float, evaluate: Evaluate) -> float:
        perturbed = copy.deepcopy(self.model)
        pass_over(perturbed, [seed], [offset])
        return evaluate(perturbed)


class StreamedFloatReference(StreamedReference):
    """The copies are fp32: w widened, then perturbed."""

    def _side(self, seed: int, offset: float, evaluate: Evaluate) -> float:
        perturbed = copy.deepcopy(self.model).float()
        pass_over(perturbed, [seed], [offset])
        return evaluate(perturbed)
