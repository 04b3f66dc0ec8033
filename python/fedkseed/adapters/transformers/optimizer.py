"""The optimizer of a zeroth-order Trainer: its settings, and how training arguments make it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from fedkseed.optim import ZOSGD, FedKSeedSGD
from fedkseed.optim.base import ZerothOrderOptimizer
from fedkseed.seeds import SeedPool
from fedkseed.storage import Inplace, StorageChoice, Streamed


@dataclass(frozen=True)
class Settings:
    """What `TrainingArguments` has no field for; see `ZOTrainerMixin`.

    Raises:
        ValueError: settings that exclude each other.
    """

    eps: float
    num_directions: int
    seed_pool: SeedPool | None
    noise_seed: int | None
    storage: StorageChoice
    family: str
    max_abs_g: float | None
    max_loss_gap: float | None

    def __post_init__(self) -> None:
        if self.seed_pool is not None and self.num_directions != 1:
            raise ValueError(
                f"expected num_directions 1 with a seed_pool, got {self.num_directions}: a ledger has one "
                "direction a step"
            )
        if self.seed_pool is not None and self.noise_seed is not None:
            raise ValueError("expected either seed_pool or noise_seed, got both: the pool has a seed")

    def differing(self, function: Callable[..., Any]) -> list[str]:
        """Names of the settings that are not what a function's parameters of these names begin with."""
        begins = inspect.signature(function).parameters
        return [
            field.name for field in fields(self) if getattr(self, field.name) != begins[field.name].default
        ]

    def make(
        self, model: nn.Module, args: Any, decaying: Callable[[nn.Module], list[str]], accelerator: Any
    ) -> ZerothOrderOptimizer:
        """The optimizer of what requires a gradient in the model.

        Args:
            args: `transformers.TrainingArguments`.
            decaying: names of the parameters that decay; asked if any do.
            accelerator: of the Trainer: the losses of its processes become one.

        Raises:
            TypeError, ValueError: as `ZOSGD` and `FedKSeedSGD`; weight decay with a pool; torch_compile
                beside streamed storage.
        """
        lr, weight_decay = args.learning_rate, args.weight_decay
        storage, reduce = self._storage_of(args.torch_compile), mean_over_processes(accelerator)
        if self.seed_pool is not None:
            return FedKSeedSGD(
                model,
                lr,
                self.eps,
                self.seed_pool,
                weight_decay=weight_decay,
                max_abs_g=self.max_abs_g,
                max_loss_gap=self.max_loss_gap,
                storage=storage,
                family=self.family,
                reduce=reduce,
            )
        return ZOSGD(
            groups_of(model, weight_decay, decaying(model)) if weight_decay else model,
            lr,
            self.eps,
            seed=args.seed if self.noise_seed is None else self.noise_seed,
            num_directions=self.num_directions,
            max_abs_g=self.max_abs_g,
            max_loss_gap=self.max_loss_gap,
            model=model if weight_decay else None,
            storage=storage,
            family=self.family,
            reduce=reduce,
        )

    def _storage_of(self, is_compiled: bool) -> StorageChoice:
        """The mode that was chosen; of compiled models, which streamed modes cannot see into, in place."""
        if is_compiled and isinstance(self.storage, Streamed):
            raise ValueError(
                "expected no torch_compile beside streamed storage, which acts between a model's modules, "
                "got both; take storage=Inplace()"
            )
        return Inplace() if is_compiled and self.storage == "auto" else self.storage


def groups_of(model: nn.Module, weight_decay: float, decaying: list[str]) -> list[dict[str, Any]]:
    """The parameters that require a gradient, (name, parameter), in at most two groups; none is empty."""
    names = frozenset(decaying)
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name not in names]["params"].append((name, parameter))
    return [group for group in groups if group["params"]]


def mean_over_processes(accelerator: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What makes the losses of several processes one: their mean, for which Trainer scales them."""
    if accelerator.num_processes == 1:
        return None

    def mean(losses: torch.Tensor) -> torch.Tensor:
        reduced: torch.Tensor = accelerator.reduce(losses.to(accelerator.device), "mean")
        return reduced.to(losses.device)

    return mean
