"""The steps that `benchmarks.step` times and weighs: official, in plain torch, and in every storage mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.baselines import mezo, official
from benchmarks.common.constants import LEARNING_RATE, ZO_EPS
from benchmarks.models import modes
from benchmarks.models.workloads import mean_loss
from fedkseed import FedKSeedSGD, SeedPool
from fedkseed.optim.paired import paired_losses

OFFICIAL, MEZO = "official step", "MeZO-style torch step"
FORWARDS, FORWARDS_FP32 = "two forwards", "two forwards, fp32"

_POOL = SeedPool(11)

Step = Callable[[], None]


def names(dtype: torch.dtype, family: str) -> list[str]:
    """All contestants with weights of this dtype: the torch steps draw Gaussian noise alone."""
    torch_steps = [OFFICIAL, MEZO] if family == "gaussian" else []
    return [*torch_steps, *modes.modes(dtype), *baselines(dtype)]


def baselines(dtype: torch.dtype) -> list[str]:
    """The forward passes of a step alone: in the weights' dtype, and in fp32."""
    return [FORWARDS] if dtype == torch.float32 else [FORWARDS, FORWARDS_FP32]


def baseline_of(name: str, dtype: torch.dtype) -> str:
    """The forward passes that a contestant makes."""
    in_fp32 = name == FORWARDS_FP32 or modes.computes_in_fp32(name)
    return FORWARDS_FP32 if in_fp32 and dtype != torch.float32 else FORWARDS


def open_step(name: str, model: Any, batch: torch.Tensor, family: str) -> Step:
    """What does one step of a contestant each time it is called.

    Args:
        model: walks; it is the contestant's from now on.
        batch: int64 [rows, tokens], on the model's device.
        family: of the noise of our own modes.

    Raises:
        ValueError: an unknown name.
    """
    if name == OFFICIAL:
        return _official_step(model, batch)
    if name == MEZO:
        return _mezo_step(model, batch)
    if name in (FORWARDS, FORWARDS_FP32):
        return _two_forwards(model.float() if name == FORWARDS_FP32 else model, batch)
    options = modes.modes(model.dtype).get(name)
    if options is None:
        raise ValueError(
            f"expected a contestant out of {', '.join(names(model.dtype, family))}, got {name!r}"
        )
    optimizer = FedKSeedSGD(model, LEARNING_RATE, ZO_EPS, _POOL, storage=options, family=family)
    if name in modes.PAIRED:
        paired = {"input_ids": batch, "labels": batch}
        return lambda: _ignore(optimizer.step(lambda: paired_losses(model, paired)))
    return lambda: _ignore(optimizer.step(lambda: mean_loss(model, batch)))


def _official_step(model: Any, batch: torch.Tensor) -> Step:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    seeds = _seeds()

    def step() -> None:
        seed = next(seeds)
        official.perturb_(named, seed, 1, ZO_EPS)
        plus = mean_loss(model, batch)
        official.perturb_(named, seed, -2, ZO_EPS)
        minus = mean_loss(model, batch)
        official.perturb_(named, seed, 1, ZO_EPS)
        official.update_(named, seed, float((plus - minus) / (2 * ZO_EPS)), LEARNING_RATE)

    return step


def _mezo_step(model: Any, batch: torch.Tensor) -> Step:
    parameters, seeds = list(model.parameters()), _seeds()
    return lambda: _ignore(
        mezo.step_(parameters, lambda: mean_loss(model, batch), next(seeds), LEARNING_RATE, ZO_EPS)
    )


def _two_forwards(model: Any, batch: torch.Tensor) -> Step:
    def step() -> None:
        for _ in range(2):
            float(mean_loss(model, batch))

    return step


def _seeds() -> Any:
    return iter([official.official_seed(int(seed)) for seed in _POOL.seeds])


def _ignore(_: object) -> None:
    """A step's result is not wanted here."""
