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

from fedkseed_kernels.contract import arithmetic, derived, reference
from support.carried_decay import CarriedDecay

Evaluate = Callable[[nn.Module], float]
#: Stream and number of elements of each tensor.
Layout = tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def noise(layout: Layout, seed: int) -> NDArray[np.float32]:
    """z of the tensors, one behind the other."""
    return np.concatenate([reference.gaussian(seed, stream, np.arange(size)) for stream, size in layout])


@lru_cache(maxsize=256)
def rounding_bits(layout: Layout, rounding_seed: int) -> NDArray[np.uint16]:
    """The random bits of stochastic rounding, laid out as `noise` is."""
    pieces = [reference.rounding_bits(rounding_seed, stream, np.arange(size)) for stream, size in layout]
    return np.concatenate(pieces)


def pass_over(
    model: nn.Module,
    seeds: Sequence[int],
    coeffs: Sequence[float],
    alpha: float = 1.0,
    rounding_seed: int | None = None,
) -> None:
    """The primitive (contract, section 6.1) in place over all tuned parameters, tied ones once; of one dtype.

    A frozen parameter stays as it is, and keeps its stream.
    Rounds stochastically if there is a rounding seed, to nearest if not.
    """
    numbered = [(i, p.detach()) for i, (_, p) in enumerate(model.named_parameters()) if p.requires_grad]
    layout = tuple((stream, parameter.numel()) for stream, parameter in numbered)
    parameters = [parameter for _, parameter in numbered]
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    terms = [(c, noise(layout, seed)) for seed, c in zip(seeds, coeffs, strict=True) if c]
    if alpha == 1 and not terms:
        return
    fma, number = (
        (arithmetic.fma64, np.float64) if flat.dtype == torch.float64 else (arithmetic.fma32, np.float32)
    )
    acc: Any = number(-0.0)
    for coefficient, z in terms:
        acc = fma(number(coefficient), z, acc)
    widened = flat.float() if flat.dtype == torch.bfloat16 else flat
    y = fma(number(np.float32(alpha)), widened.numpy(), acc)
    if flat.dtype != torch.bfloat16:
        moved = torch.from_numpy(y)
    else:
        patterns = (
            reference.round_to_nearest(y, "bfloat16")
            if rounding_seed is None
            else arithmetic.round_to_bf16_stochastic(y, rounding_bits(layout, rounding_seed))
        )
        moved = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16)
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
    return parameter.detach().flatten().view(torch.uint8)


class Reference:
    """What all have: a copy of the model, and the numbers of a step; ``decay`` is lr times weight decay."""

    def __init__(self, model: nn.Module, eps: float, lr: float, decay: float, seed: int) -> None:
        self.model = copy.deepcopy(model)
        self.eps, self.lr, self.decay = eps, lr, CarriedDecay(decay)
        self.seed = seed
        self.num_passes = 0

    #: Whether passes round stochastically, the n-th of them with the rounding seed n of the optimizer's seed.
    is_stochastic = False

    @property
    def alpha(self) -> float:
        return self.decay.alpha

    def rounding_seed(self) -> int | None:
        if not self.is_stochastic:
            return None
        return int(derived.seeds(self.seed, derived.PURPOSE_ROUNDING_SEEDS, [self.num_passes])[0])


class InplaceReference(Reference):
    """w + eps z; minus 2 eps z; restore and update in one pass, (alpha eps - lr g) z."""

    def losses(self, seed: int, evaluate: Evaluate) -> tuple[float, float]:
        self.move([seed], [self.eps])
        return self.both(seed, evaluate)

    def both(self, seed: int, evaluate: Evaluate) -> tuple[float, float]:
        plus = evaluate(self.model)
        self.move([seed], [-2 * self.eps])
        return plus, evaluate(self.model)

    def update(self, seed: int, g: float, next_seed: int) -> None:
        self.move([seed], [self.alpha * self.eps - self.lr * g], self.alpha)

    def flush(self) -> None:
        """Does nothing: nothing waits."""

    def restore(self, seed: int, num_evaluations: int) -> None:
        """Called after a closure that raised when it was called for the ``num_evaluations``-th time."""
        self.move([seed], [self.eps])
        self.back(seed, num_evaluations)

    def back(self, seed: int, num_evaluations: int) -> None:
        if num_evaluations == 2:
            self.move([seed], [-2 * self.eps])
        self.move([seed], [-self.eps if num_evaluations == 1 else self.eps])

    def move(self, seeds: Sequence[int], coeffs: Sequence[float], alpha: float = 1.0) -> None:
        pass_over(self.model, seeds, coeffs, alpha, self.rounding_seed())
        self.num_passes += 1


class ChainedReference(InplaceReference):
    """Steps in place, but the update's pass goes on to w + eps z of the step to come."""

    waiting: int | None = None

    def losses(self, seed: int, evaluate: Evaluate) -> tuple[float, float]:
        return self.both(seed, evaluate) if self.taken(seed) else super().losses(seed, evaluate)

    def update(self, seed: int, g: float, next_seed: int) -> None:
        coeffs = [self.alpha * self.eps - self.lr * g, self.eps]
        self.move([seed, next_seed], coeffs, self.alpha)
        self.waiting = next_seed

    def flush(self) -> None:
        if self.waiting is not None:
            self.move([self.waiting], [-self.eps])
            self.waiting = None

    def restore(self, seed: int, num_evaluations: int) -> None:
        if self.taken(seed):
            self.back(seed, num_evaluations)
        else:
            super().restore(seed, num_evaluations)

    def taken(self, seed: int) -> bool:
        """Whether the perturbation of this seed was made by the step before; only this one can wait."""
        assert self.waiting in (None, seed)
        was_waiting, self.waiting = self.waiting is not None, None
        return was_waiting


class StreamedReference(Reference):
    """Both sides are copies made from the weights, which only the update changes: -lr g z."""

    def losses(self, seed: int, evaluate: Evaluate) -> tuple[float, float]:
        return self.side(seed, self.eps, evaluate), self.side(seed, -self.eps, evaluate)

    def side(self, seed: int, offset: float, evaluate: Evaluate) -> float:
        """Loss of a copy at w + offset z. The two sides are one pass, and share its random bits."""
        perturbed = copy.deepcopy(self.model)
        pass_over(perturbed, [seed], [offset], rounding_seed=self.rounding_seed())
        return evaluate(perturbed)

    def update(self, seed: int, g: float, next_seed: int) -> None:
        self.num_passes += 1
        pass_over(self.model, [seed], [-self.lr * g], self.alpha, self.rounding_seed())
        self.num_passes += 1

    def flush(self) -> None:
        """Does nothing: nothing waits."""

    def restore(self, seed: int, num_evaluations: int) -> None:
        """Does nothing: nothing was changed."""


class StreamedFloatReference(StreamedReference):
    """The copies are fp32: w widened, then perturbed."""

    def side(self, seed: int, offset: float, evaluate: Evaluate) -> float:
        perturbed = copy.deepcopy(self.model).float()
        pass_over(perturbed, [seed], [offset])
        return evaluate(perturbed)


class CompensatedReference(StreamedReference):
    """bf16 weights with residuals (contract, section 6.5) are fp32 numbers of which bf16 copies are read.

    The stored weights are their upper halves, rounded to nearest, ties away from zero.
    """

    def __init__(self, model: nn.Module, eps: float, lr: float, decay: float, seed: int) -> None:
        super().__init__(model, eps, lr, decay, seed)
        self.values = copy.deepcopy(model).float()

    def side(self, seed: int, offset: float, evaluate: Evaluate) -> float:
        values = copy.deepcopy(self.values)
        pass_over(values, [seed], [offset])
        perturbed = copy.deepcopy(self.model)
        self.store(perturbed, [value.bfloat16() for value in values.parameters()])
        return evaluate(perturbed)

    def update(self, seed: int, g: float, next_seed: int) -> None:
        pass_over(self.values, [seed], [-self.lr * g], self.alpha)
        patterns = [value.detach().view(torch.int32) for value in self.values.parameters()]
        upper = [((pattern + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16) for pattern in patterns]
        self.store(self.model, upper)

    def store(self, model: nn.Module, weights: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)


class CompensatedFloatReference(CompensatedReference):
    """The copies are those fp32 numbers, perturbed."""

    def side(self, seed: int, offset: float, evaluate: Evaluate) -> float:
        values = copy.deepcopy(self.values)
        pass_over(values, [seed], [offset])
        return evaluate(values)


def stochastic(kind: type[Reference]) -> type[Reference]:
    """The same with stochastic rounding."""
    return type(f"Stochastic{kind.__name__}", (kind,), {"is_stochastic": True})
