"""The error of g with weights of 16 bits, and the held-out loss of weights, both by fp32 forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

import fedkseed_kernels
from benchmarks.baselines import official
from benchmarks.drift.settings import DriftSettings
from benchmarks.drift.walks import StorageWalk, value64
from benchmarks.models import modes
from benchmarks.models.workloads import assign_, mean_loss
from fedkseed.model.manifest import manifest_parameters

#: Held-out rows of one forward pass.
_ROWS_AT_ONCE = 8


class HeldOut:
    """The mean loss of weights on the held-out rows, in nats a token, computed in fp32.

    Attributes:
        model: the fp32 model whose weights are overwritten each time.
    """

    def __init__(self, settings: DriftSettings) -> None:
        work = settings.load(torch.float32)
        self.model = work.model
        self._rows = work.held_out

    def loss(self, weights: Iterable[torch.Tensor]) -> float:
        """Loss at weights in the order of the manifest."""
        assign_(self.model, weights)
        parts = self._rows.split(_ROWS_AT_ONCE)
        total = sum(float(mean_loss(self.model, rows)) * len(rows) for rows in parts)
        return total / len(self._rows)


def of_storage(
    settings: DriftSettings, dtype: torch.dtype, names: Sequence[str], master: Any
) -> dict[str, dict[str, Any]]:
    """The g of each mode's first steps by its own forward passes and by fp32 ones at the same weights.

    Args:
        master: the fp32 model; its weights are overwritten.
    """
    found, pool = {}, settings.pool
    for name in names:
        work = settings.load(dtype)
        walk = StorageWalk(work.model, modes.ONE_SIDED[name], pool, settings.lr, settings.eps)
        measured, reference = [], []
        for step in range(settings.num_g_steps):
            rows, seed = work.train[step : step + 1], int(pool.seeds[step])
            values = [value64(walk.stored(index)).float() for index in range(len(walk.parameters))]
            reference.append(_reference(master, values, rows, settings.eps, _contract_noise_adder(seed)))
            measured.append(walk.step_on(rows))
        found[name] = _summary(measured, reference)
    return found


def of_official(settings: DriftSettings, dtype: torch.dtype, master: Any) -> dict[str, Any]:
    """The same as `of_storage`, for the official algorithm and the noise that it draws."""
    work = settings.load(dtype)
    named = list(work.model.named_parameters())
    seeds = settings.pool.seeds
    measured, reference = [], []
    for step in range(settings.num_g_steps):
        rows, seed = work.train[step : step + 1], official.official_seed(int(seeds[step]))
        values = [parameter.detach().float() for _, parameter in named]
        reference.append(_reference(master, values, rows, settings.eps, _torch_noise_adder(seed, dtype)))
        official.perturb_(named, seed, 1, settings.eps)
        plus = mean_loss(work.model, rows)
        official.perturb_(named, seed, -2, settings.eps)
        minus = mean_loss(work.model, rows)
        official.perturb_(named, seed, 1, settings.eps)
        measured.append(float((plus - minus) / (2 * settings.eps)))
        official.update_(named, seed, measured[-1], settings.lr)
    return _summary(measured, reference)


_NoiseAdder = Callable[[Sequence[torch.Tensor], float], None]


@torch.no_grad()
def _reference(
    master: Any, values: Sequence[torch.Tensor], rows: torch.Tensor, eps: float, add_noise_: _NoiseAdder
) -> float:
    """g of fp32 forward passes at values + eps z and at values - eps z, each perturbed in fp32."""
    parameters = [parameter.data for _, parameter in manifest_parameters(master)]
    losses = []
    for scale in (eps, -eps):
        assign_(master, values)
        add_noise_(parameters, scale)
        losses.append(float(mean_loss(master, rows).double()))
    return (losses[0] - losses[1]) / (2 * eps)


def _contract_noise_adder(seed: int) -> _NoiseAdder:
    return lambda tensors, scale: fedkseed_kernels.perturb_(list(tensors), seed, scale)


def _torch_noise_adder(seed: int, dtype: torch.dtype) -> _NoiseAdder:
    def add_(tensors: Sequence[torch.Tensor], scale: float) -> None:
        torch.manual_seed(seed)
        for tensor in tensors:
            z = torch.normal(0, 1, size=tensor.shape, device=tensor.device, dtype=dtype)
            tensor.add_(z.float(), alpha=scale)

    return add_


def _summary(measured: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Both lists and ||g - g_ref|| / ||g_ref|| over the steps."""
    off = np.array(measured) - np.array(reference)
    error = float(np.linalg.norm(off) / np.linalg.norm(reference))
    return {"measured": list(measured), "reference": list(reference), "relative_error": error}
