"""Walks along one schedule of seeds whose distance from exact arithmetic can be measured, tensor by tensor.

`StorageWalk` is the optimizer in one of its storage modes, `OfficialWalk` the official algorithm. Both step
with a scalar g that is handed to them, so that walks differ by their arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

import fedkseed_kernels
from benchmarks.baselines import official
from benchmarks.models.workloads import mean_loss
from fedkseed import FedKSeedSGD, Inplace, SeedPool, Streamed
from fedkseed.model.manifest import manifest_parameters

if TYPE_CHECKING:
    from fedkseed.storage import StorageOptions

Stored = tuple[torch.Tensor, torch.Tensor | None]


class StorageWalk:
    """FedKSeedSGD in one storage mode; step t takes seed t of the pool.

    Args:
        model: walks; its weights as they stand are w0. All of its parameters are tuned.
    """

    def __init__(
        self, model: torch.nn.Module, options: StorageOptions, pool: SeedPool, lr: float, eps: float
    ) -> None:
        self.model = model
        self.pool = pool
        self.parameters = [parameter for _, parameter in manifest_parameters(model)]
        self.optimizer = FedKSeedSGD(model, lr, eps, pool, schedule=range(pool.num_seeds), storage=options)
        self._leaves_a_perturbation = isinstance(options, Inplace) and options.chained
        self._is_compensated = isinstance(options, Streamed) and options.compensated
        self._residuals: list[torch.Tensor] | None = None  # copies, of the moment when they were last read

    def step(self, g: float) -> None:
        """One step whose losses are such that the optimizer finds this g (an fp32 value)."""
        self._residuals = None
        loss = self.optimizer.eps * g
        sides = iter((loss, -loss))
        self.optimizer.step(lambda: next(sides))

    def step_on(self, rows: torch.Tensor) -> float:
        """One step with the mode's own forward passes; returns g."""
        self._residuals = None
        self.optimizer.step(lambda: mean_loss(self.model, rows))
        return self.optimizer.history[-1][1]

    def stored(self, index: int) -> Stored:
        """Weights, and residuals if there are any, of a parameter as a reader would find them.

        What a chained walk has left for its next step is taken back on a copy: the walk goes on undisturbed.
        """
        parameter = self.parameters[index].detach()
        num_steps = len(self.optimizer.history)
        if self._leaves_a_perturbation and 0 < num_steps < self.pool.num_seeds:
            parameter = parameter.clone()
            seed = int(self.pool.seeds[num_steps])
            fedkseed_kernels.perturb_([parameter], seed, -self.optimizer.eps, streams=[index])
        if not self._is_compensated:
            return parameter, None
        if self._residuals is None:
            self._residuals = self.optimizer.state_dict()["fedkseed"]["storage_state"]["residuals"]
        return parameter, self._residuals[index]


class OfficialWalk:
    """The official algorithm with g handed to it: each tensor gets all four passes of a step in turn.

    The passes of `official.perturb_` and `official.update_` are elementwise and draw the same noise each
    time, so drawing it once for a tensor gives their bits in a quarter of the time.

    Attributes:
        parameters: the walked weights.
        rebuilt: w0 after the update pass of each step alone, as the official server rebuilds a model.
        exact: fp64, the sum of -lr g z, with z as drawn in the weights' dtype.
    """

    def __init__(self, model: torch.nn.Module, lr: float, eps: float) -> None:
        self.parameters = [parameter for _, parameter in manifest_parameters(model)]
        self.rebuilt = [parameter.detach().clone() for parameter in self.parameters]
        self.exact = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in self.parameters]
        self._lr, self._eps = lr, eps

    @torch.no_grad()
    def step(self, seed: int, g: float) -> tuple[int, int]:
        """One step along the noise of seed; (elements with z != 0 that kept their value, all with z != 0)."""
        num_kept = num_due = 0
        torch.manual_seed(official.official_seed(seed))
        for parameter, rebuilt, exact in zip(self.parameters, self.rebuilt, self.exact, strict=True):
            z = torch.normal(0, 1, size=parameter.shape, device=parameter.device, dtype=parameter.dtype)
            w = parameter.data
            for factor in (1, -2, 1):
                w = w + factor * self._eps * z
            w = w - self._lr * (g * z)
            due = z != 0 if g else torch.zeros_like(z, dtype=torch.bool)
            num_kept += int(((w == parameter.data) & due).sum())
            num_due += int(due.sum())
            parameter.data = w
            rebuilt.copy_(rebuilt - self._lr * (g * z))
            exact.sub_(z.double().mul_(self._lr * g))
        return num_kept, num_due

    def stored(self, index: int) -> Stored:
        """The weights of a parameter; there are no residuals."""
        return self.parameters[index].detach(), None


class ExactSum:
    """sum_k c_k z(s_k) in fp64, of every parameter of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tensors = [
            torch.zeros_like(parameter, dtype=torch.float64) for _, parameter in manifest_parameters(model)
        ]
        self._prepared = fedkseed_kernels.prepare(self.tensors)

    def add_(self, seed: int, coefficient: float) -> None:
        """One more term."""
        self._prepared.seed_axpy_([seed], [coefficient])


def value64(stored: Stored) -> torch.Tensor:
    """What a weight and its residual stand for (contract, section 6.5), in fp64."""
    weight, residual = stored
    if residual is None:
        return weight.double()
    if weight.dtype == torch.bfloat16:
        high = weight.view(torch.int16).to(torch.int32) << 16
        return (high + residual.to(torch.int32)).view(torch.float32).double()
    value = weight.double()
    _, exponent = torch.frexp(value)  # 2^(exponent - 1) <= |w|
    exponent = torch.where(value.abs() < 2.0**-14, -14, exponent - 1)
    return value + torch.ldexp(residual.double(), exponent - 25)


def distance(
    walked: Callable[[int], Stored], w0: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> float:
    """||w - w_exact|| / ||w_exact - w0||, Euclidean over all elements, in fp64."""
    off = moved = 0.0
    for index, (start, delta) in enumerate(zip(w0, exact, strict=True)):
        difference = (value64(walked(index)) - start).sub_(delta)
        off += float(torch.linalg.vector_norm(difference) ** 2)
        moved += float(torch.linalg.vector_norm(delta) ** 2)
    return float((off / moved) ** 0.5)


def num_kept(before: Stored, after: Stored, due: torch.Tensor) -> int:
    """How many elements of those due kept both weight and residual."""
    kept = (before[0] == after[0]) & due
    if before[1] is not None and after[1] is not None:
        kept &= before[1] == after[1]
    return int(kept.sum())


def snapshot(walk: StorageWalk) -> list[Stored]:
    """Copies of everything stored."""
    found: list[Any] = []
    for index in range(len(walk.parameters)):
        weight, residual = walk.stored(index)
        found.append((weight.clone(), None if residual is None else residual.clone()))
    return found
