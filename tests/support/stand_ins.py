"""Stand-ins for Lightning and peft, as much of them as `docs/optimizer.md` uses: tests install neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class LightningOptimizer:
    """What Lightning 2.6 hands out by ``self.optimizers()``: it borrows the class and all attributes.

    Its ``step`` always passes a closure, and what is set on it stays on it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        borrowed = (type(self), type(optimizer))
        self.__class__ = type("Lightning" + type(optimizer).__name__, borrowed, {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.optimizer.step(closure or (lambda: None))  # type: ignore[arg-type, return-value]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class LightningModule(nn.Module):
    """The hooks that a manual optimization needs; what is logged is kept in ``logged``."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True
        self.logged: list[tuple[str, Any]] = []

    def optimizers(self) -> Any:
        return self._wrapper

    def log(self, name: str, value: Any) -> None:
        self.logged.append((name, value))


class Trainer:
    """The loop of a manual optimization: one `training_step` a batch."""

    def __init__(self, max_epochs: int, **options: Any) -> None:
        self.max_epochs = max_epochs

    def fit(self, module: Any, batches: Iterable[Any]) -> None:
        self.module = module
        assert not module.automatic_optimization
        module._wrapper = LightningOptimizer(module.configure_optimizers())
        for _ in range(self.max_epochs):
            for number, batch in enumerate(batches):
                module.training_step(batch, number)


@dataclass
class LoraConfig:
    r: int
    target_modules: list[str]


class _Adapted(nn.Module):
    """A frozen linear layer and the product of two small matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base_layer(inputs) + self.lora_B(self.lora_A(inputs))  # type: ignore[no-any-return]


def get_peft_model(model: nn.Module, config: LoraConfig) -> nn.Module:
    """The model with its targets adapted, all else frozen."""
    model.requires_grad_(False)
    for name in config.target_modules:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, _Adapted(layer, config.r))
    return model


def modules() -> dict[str, ModuleType]:
    """What to put into ``sys.modules``."""
    lightning, peft = ModuleType("lightning"), ModuleType("peft")
    vars(lightning).update(LightningModule=LightningModule, Trainer=Trainer)
    vars(peft).update(LoraConfig=LoraConfig, get_peft_model=get_peft_model)
    return {"lightning": lightning, "peft": peft}
